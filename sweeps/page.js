"use strict";
// Without this script the page has all its content; it adds sorting, the filter, tooltips and arrow keys.
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// ---- sorting: each header becomes a button

function key(row, column) {
  const cell = row.cells[column];
  const text = (cell?.dataset.v ?? cell?.textContent ?? "").trim();
  const number = parseFloat(text.replace(/,/g, "").replace(/^</, ""));
  return { text, number: /^[<+-]?[\d.]/.test(text) ? number : NaN };
}

const words = new Intl.Collator("en", { numeric: true });

function compare(a, b, sign) {
  if (isNaN(a.number) && isNaN(b.number)) return sign * words.compare(a.text, b.text);
  if (isNaN(a.number)) return 1; // what has no number comes last either way
  if (isNaN(b.number)) return -1;
  return sign * (a.number - b.number);
}

for (const table of all("table")) {
  const body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  all("thead th", table).forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    header.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of all("th[aria-sort]", table)) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => ({ row, key: key(row, column) }));
      rows.sort((a, b) => compare(a.key, b.key, sign));
      for (const { row } of rows) row.classList.remove("again");
      body.append(...rows.map(({ row }) => row));
    });
  });
}

// ---- one stop of the tab key for a table's numbers or a figure's points; arrow keys go on from there

for (const group of all("[data-rove]")) {
  const links = () => all("td a, a.pt", group);
  links().forEach((link, place) => (link.tabIndex = place ? -1 : 0));
  group.addEventListener("focusin", ({ target }) => {
    const link = target.closest("td a, a.pt");
    if (!link) return;
    for (const other of all('[tabindex="0"]', group)) other.tabIndex = -1;
    link.tabIndex = 0;
  });
  group.addEventListener("keydown", (event) => {
    const link = event.target.closest("td a, a.pt");
    const to = link && next(group, links(), link, event.key);
    if (!to) return;
    event.preventDefault();
    to.focus();
  });
}

function next(group, links, link, pressed) {
  const place = links.indexOf(link);
  if (pressed === "ArrowRight") return links[place + 1];
  if (pressed === "ArrowLeft") return links[place - 1];
  if (pressed === "Home") return links[0];
  if (pressed === "End") return links[links.length - 1];
  const down = { ArrowDown: 1, ArrowUp: -1 }[pressed];
  if (!down) return null;
  if (group.tagName !== "TABLE") {
    // The next line of a figure, at the same place in it.
    const line = (step) => links.filter((other) => +other.dataset.l === +link.dataset.l + step);
    const other = line(down);
    return other[Math.min(line(0).indexOf(link), other.length - 1)];
  }
  const cell = link.closest("td");
  for (let row = sibling(cell.parentElement, down); row; row = sibling(row, down)) {
    const found = row.cells[cell.cellIndex]?.querySelector("a");
    if (found) return found;
  }
  return null;
}

const sibling = (row, down) => (down > 0 ? row.nextElementSibling : row.previousElementSibling);

// ---- figures: what a point is, and its line alone

const tip = document.getElementById("tip");

function point(link) {
  for (const plot of all(".plot.on")) {
    plot.classList.remove("on");
    for (const lit of all(".lit", plot)) lit.classList.remove("lit");
  }
  tip.hidden = !link;
  if (!link) return;
  const plot = link.closest(".plot");
  for (const part of all(`[data-l="${link.dataset.l}"]`, plot)) part.classList.add("lit");
  plot.classList.add("on");
  tip.textContent = link.getAttribute("aria-label");
  const at = link.getBoundingClientRect();
  const left = Math.min(at.left + at.width / 2 - tip.offsetWidth / 2, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const above = at.top - tip.offsetHeight - 6;
  tip.style.left = `${Math.max(8, left) + scrollX}px`;
  tip.style.top = `${(above > 0 ? above : at.bottom + 6) + scrollY}px`;
}

for (const plot of all(".plot")) {
  for (const [name, shows] of [["pointerover", true], ["focusin", true], ["pointerout", false], ["focusout", false]])
    plot.addEventListener(name, ({ target }) => point(shows ? target.closest(".pt") : null));
}
addEventListener("keydown", (event) => event.key === "Escape" && point(null));

// ---- the filter of sample chains

for (const form of all(".filter")) {
  const chains = all(".chain", form.parentElement);
  const shown = () => {
    const wanted = [...new FormData(form)].filter(([, value]) => value);
    const fits = (chain) => wanted.every(([name, value]) =>
      name === "member" ? chain.dataset.member.split(" ").includes(value) : chain.dataset[name] === value);
    for (const chain of chains) chain.hidden = !fits(chain);
    const count = chains.filter((chain) => !chain.hidden).length;
    form.querySelector("output").textContent = `${count} of ${chains.length} chains`;
  };
  form.hidden = !chains.length;
  form.addEventListener("change", shown);
  form.addEventListener("submit", (event) => event.preventDefault());
  const last = chains.filter((chain) => chain.dataset.member.split(" ").includes("0")).pop();
  if (last) {
    form.elements.member.value = "0";
    form.elements.phase.value = last.dataset.phase;
  }
  shown();
}

// ---- a record's entry opens where a link leads to it, and the way back leads to the link

let from = null;
addEventListener("click", ({ target }) => (from = target.closest('a[href^="#"]') ?? from));

function arrive() {
  const entry = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (entry?.matches(".record")) {
    entry.closest("details").open = true;
    entry.scrollIntoView();
    entry.focus({ preventScroll: true });
  } else if (!entry) {
    from?.focus();
  }
}
addEventListener("hashchange", arrive);
arrive();
