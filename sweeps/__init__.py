"""From the store's records to tables, figures and W&B. Nothing here runs a model; all of it can be made again."""
