import json

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from evolve import config, templates
from evolve.config import CONF, ConfigError, Template

FILES = sorted((CONF / "template").glob("*.yaml"))
PROMPT, ANSWER = "3 0 1 2 0 1 2", "1 2 2 1 3 3 2 0"
# What the world's tokenizer reads; other text it drops.
ledger = st.lists(st.sampled_from("0123"), min_size=1, max_size=12).map(" ".join)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return templates.load_tokenizer(tiny, None, False)


@pytest.fixture(scope="module")
def composed():
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config"), resolve=True)


def load(composed, **changes):
    return config.load({**composed, "template": {**composed["template"], **changes}})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_projects_templates(file):
    template = Template(**yaml.safe_load(file.read_text()))
    assert template.name == file.stem
    ((role, text),) = [message.values() for message in templates.refine(template, "my prompt", ["first", "second"])]
    assert role == "user"
    assert text.index("my prompt") < text.index("first" + template.separator + "second")
    assert not text.endswith("\n")
    # A further answer stands under the heading that the first one has.
    assert text.count(template.separator) == 2


def test_there_are_three_templates():
    assert [file.stem for file in FILES] == ["improve", "revise", "rewrite"]


FIELDS = st.lists(st.sampled_from(["{prompt}", "{response}", "{", "}", "\\1", "%s", "a"]), max_size=4).map("".join)


@given(FIELDS, FIELDS)
def test_fields_are_filled_in_one_pass(prompt, response):
    """Whatever looks like a field in a prompt or an answer stays as it is."""
    template = Template(name="t", text="<{prompt}|{response}>", separator="", path=None)
    assert templates.refine(template, prompt, [response]) == templates.direct(f"<{prompt}|{response}>")


@given(ledger, st.lists(ledger, max_size=3))
def test_exactly_one_bos(tokenizer, template, prompt, earlier):
    for messages in (templates.direct(prompt), templates.refine(template, prompt, earlier)):
        ids = templates.encode_prompt(tokenizer, messages)
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


@given(ledger, ledger, st.booleans())
def test_an_encoded_answer_follows_its_prompt(tokenizer, template, prompt, answer, finished):
    messages = templates.refine(template, prompt, [answer])
    ids, start = templates.encode(tokenizer, messages, answer, finished)
    assert ids[:start] == templates.encode_prompt(tokenizer, messages)
    end = [tokenizer.eos_token_id] if finished else []
    assert ids[start:] == tokenizer(answer, add_special_tokens=False).input_ids + end


def changed(tokenizer, chat_template):
    from copy import copy

    other = copy(tokenizer)
    other.chat_template = chat_template
    return other


def test_what_a_template_writes_behind_the_end_is_no_part_of_the_answer(tokenizer):
    trailing = tokenizer.chat_template.replace("eos_token }}", "eos_token + '3 3' }}")
    messages = templates.direct(PROMPT)
    for finished in (True, False):
        expected = templates.encode(tokenizer, messages, ANSWER, finished)
        assert templates.encode(changed(tokenizer, trailing), messages, ANSWER, finished) == expected


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer):
    shifting = "{{ bos_token }}{% if messages|length > 1 %}0{% endif %}" + tokenizer.chat_template.removeprefix(
        "{{ bos_token }}"
    )
    with pytest.raises(ValueError, match="changes the prompt's text"):
        templates.encode(changed(tokenizer, shifting), templates.direct(PROMPT), ANSWER)


def test_a_template_that_never_ends_an_answer_is_refused(tokenizer):
    endless = tokenizer.chat_template.replace("+ eos_token", "")
    with pytest.raises(ValueError, match="doesn't end an answer"):
        templates.encode(changed(tokenizer, endless), templates.direct(PROMPT), ANSWER)


@pytest.mark.parametrize("layout", ["{{ bos_token }}", "0 1"], ids=["twice", "late"])
def test_a_bos_out_of_place_is_refused(tokenizer, layout):
    with pytest.raises(ValueError, match="one BOS"):
        templates.encode_prompt(changed(tokenizer, layout + tokenizer.chat_template), templates.direct(PROMPT))


def test_no_bos_is_allowed(tokenizer):
    without = changed(tokenizer, tokenizer.chat_template.removeprefix("{{ bos_token }}"))
    ids = templates.encode_prompt(without, templates.direct(PROMPT))
    assert ids == templates.encode_prompt(tokenizer, templates.direct(PROMPT))[1:]


@pytest.fixture
def bare(tiny, tmp_path):
    """The tiny model's tokenizer without chat template and pad token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "pad_token"}))
    return tmp_path


def test_no_chat_template_is_refused(bare):
    with pytest.raises(ValueError, match=r"no chat template; set model\.chat_template"):
        templates.load_tokenizer(bare, None, False)


def test_a_given_chat_template_counts_and_the_end_pads(bare, tokenizer):
    loaded = templates.load_tokenizer(bare, tokenizer.chat_template, False)
    assert loaded.pad_token_id == loaded.eos_token_id
    messages = templates.direct(PROMPT)
    assert templates.encode_prompt(loaded, messages) == templates.encode_prompt(tokenizer, messages)


@pytest.mark.parametrize(("text", "field"), [("{prompt}", "{response}"), ("{prompt}{prompt}{response}", "{prompt}")])
def test_a_template_without_its_field_is_one_line(composed, tmp_path, text, field):
    with pytest.raises(ConfigError) as error:
        load(composed, text=text)
    assert "template.text" in str(error.value)
    assert f"holds {field}" in str(error.value)
    assert "\n" not in str(error.value)

    file = tmp_path / "mine.txt"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"^template\.path=.*mine\.txt: holds "):
        load(composed, path=str(file))


def test_a_file_replaces_the_text(composed, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("{response} {prompt}")
    loaded = load(composed, path=str(file)).template
    assert (loaded.name, loaded.text) == ("mine", "{response} {prompt}")
    with pytest.raises(ConfigError, match="no such file"):
        load(composed, path=str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "an empty file"),
        (b" \n\t", "an empty file"),
        (b"{prompt} {response} \xff\xfe", "not a text in UTF-8"),
        (b"\x7fELF\x00\x01", "holds {prompt} 0 times"),
        (b"{prompt}", "holds {response} 0 times"),
        (b"{response}", "holds {prompt} 0 times"),
        (None, "no such file"),
    ],
)
def test_a_file_that_is_no_template_is_one_line(composed, tmp_path, content, line):
    file = tmp_path / "mine.txt"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load(composed, path=str(file))
    assert str(error.value).startswith(f"template.path={file}: ")
    assert line in str(error.value)
    assert "\n" not in str(error.value)
