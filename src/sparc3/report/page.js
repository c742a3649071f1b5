"use strict";
// The page reads without this script; it adds tips, keys, switches and orders.
(() => {
  const tips = JSON.parse(document.getElementById("tips").textContent);
  const tip = document.getElementById("tip");
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (name, className, text) => Object.assign(document.createElement(name), { className, textContent: text });

  function fill({ head, rows }) {
    const keyed = rows.some((row) => row.key), grid = make("div", keyed ? "keyed" : "", "");
    for (const row of rows) {
      if (keyed) grid.append(make("span", row.key ? `swatch ${row.key}` : "", ""));
      grid.append(make("span", "", row.name), make("span", "", row.text));
    }
    tip.replaceChildren(make("b", "", head), grid);
  }

  function place(x, y) {
    const { offsetWidth: width, offsetHeight: height } = tip;
    const left = x + 16 + width > innerWidth ? x - 16 - width : x + 16;
    tip.style.left = `${Math.max(6, Math.min(left, innerWidth - width - 6))}px`;
    tip.style.top = `${Math.max(6, Math.min(y - height / 2, innerHeight - height - 6))}px`;
  }

  function show(mark, x, y) {
    const found = tips[mark.dataset.tip];
    if (!found) return;
    fill(found);
    tip.hidden = false;
    place(x, y);
  }

  const hide = () => { tip.hidden = true; };

  document.addEventListener("pointermove", (event) => {
    const mark = event.target.closest?.("[data-tip]");
    if (mark) show(mark, event.clientX, event.clientY);
    else if (!document.activeElement?.closest?.("[data-tip]")) hide();
  });
  document.addEventListener("pointerdown", (event) => { if (!event.target.closest?.("[data-tip]")) hide(); });
  document.addEventListener("focusin", (event) => {
    const mark = event.target.closest?.("[data-tip]");
    if (!mark) return hide();
    const box = (mark.querySelector(".rule") ?? mark).getBoundingClientRect();
    show(mark, box.right, box.top + box.height / 2);
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const here = event.target.closest?.("[data-tip][tabindex]");
    if (!here) return;
    const columns = all("[data-tip][tabindex]", here.closest("[data-steps]") ?? here.ownerSVGElement), now = columns.indexOf(here), last = columns.length - 1;
    const next = { ArrowLeft: now - 1, ArrowUp: now - 1, ArrowRight: now + 1, ArrowDown: now + 1, Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const to = columns[Math.max(0, Math.min(last, next))];
    for (const column of columns) column.setAttribute("tabindex", column === to ? "0" : "-1");
    to.focus({ preventScroll: true });
  });

  for (const button of all("[data-toggle]")) {
    button.disabled = false;
    button.addEventListener("click", () => {
      const off = button.getAttribute("aria-pressed") === "true";
      for (const gallery of all(".gallery", button.closest("section"))) gallery.classList.toggle(`off-${button.dataset.toggle}`, off);
      button.setAttribute("aria-pressed", String(!off));
    });
  }

  function shorten(list, more) {
    if (!list || !more || list.children.length <= 6) return;
    list.classList.add("short");
    more.parentElement.hidden = false;
    more.addEventListener("click", () => { list.classList.remove("short"); more.parentElement.hidden = true; });
  }

  const orders = {
    drawn: (a, b) => a.dataset.place - b.dataset.place,
    fell: (a, b) => a.dataset.change - b.dataset.change || a.dataset.place - b.dataset.place,
    rose: (a, b) => b.dataset.change - a.dataset.change || a.dataset.place - b.dataset.place,
  };
  for (const kind of all("[data-kind]")) {
    const list = kind.querySelector(".pairs");
    shorten(list, kind.querySelector("[data-more]"));
    kind.querySelector(".tools").hidden = list.children.length < 3;
    kind.querySelector("[data-sort]").addEventListener("change", (event) => list.append(...[...list.children].sort(orders[event.target.value])));
  }
  const cards = document.getElementById("cards");
  if (cards) shorten(cards.querySelector("[data-cards]"), cards.querySelector("[data-more]"));
  addEventListener("beforeprint", () => all("details:not([data-long])").forEach((one) => { one.open = true; }));
})();
