"use strict";
// The data of the page, and helpers that build it. What records say goes in as text alone, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);

function make(name, properties, ...children) {
  return fill(document.createElement(name), properties, children);
}

function makeSvg(name, properties, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), properties, children);
}

function fill(element, properties, children) {
  for (const [key, value] of Object.entries(properties || {})) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(key, value);
    else if (value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Every number, so that one looks the same wherever it stands.
function fixed(value, digits) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

function whole(value) {
  return Math.round(value).toLocaleString("en-US");
}

// A number of the task's statistics; data-path says which of those of compare.py --json it is.
function statistic(task, path, digits) {
  const value = path.split(".").reduce((found, key) => (found === null ? null : found[key]), task.numbers);
  return make("span", { "data-path": path, "data-digits": digits }, fixed(value, digits));
}

// With a frame that scrolls where it is too wide, also by keyboard.
function makeTable(header, rows, label) {
  const cell = (name) => (content) => make(name, name === "th" ? { scope: "col" } : {}, content);
  const head = make("thead", {}, make("tr", {}, ...header.map(cell("th"))));
  const body = make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map(cell("td")))));
  return make(
    "div",
    { class: `scroll ${label.replace(/\W.*/, "")}`, tabindex: 0, role: "region", "aria-label": label },
    make("table", {}, head, body),
  );
}

function makeSelect(label, options, chosen, onChange) {
  const entries = options.map(([value, text]) => make("option", { value, selected: value === chosen }, text));
  const select = make("select", { onchange: (event) => onChange(event.target.value) }, ...entries);
  return make("label", { class: "field" }, `${label} `, select);
}

function makeCheck(label, checked, onChange, ...marks) {
  const box = make("input", { type: "checkbox", checked, onchange: (event) => onChange(event.target.checked) });
  return make("label", { class: "check" }, box, ...marks, make("span", { class: "name" }, label));
}

// Buttons of which one is chosen.
function makeChoice(label, options, chosen, onChange) {
  const name = `choice-${label}`;
  const buttons = options.map(([value, text]) => {
    const radio = make("input", {
      type: "radio",
      name,
      value,
      checked: value === chosen,
      onchange: () => onChange(value),
    });
    return make("label", {}, radio, make("span", {}, text));
  });
  return make("fieldset", { class: "choice" }, make("legend", {}, label), ...buttons);
}

// A spreadsheet would take text that begins so for a formula.
function asCsv(rows) {
  const cell = (value) => {
    const text = typeof value === "string" && /^[=+\-@\t]/.test(value) ? `'${value}` : String(value ?? "");
    return /[",\n']/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

function makeCsvButtons(name, makeRows) {
  const copy = make("button", { type: "button", onclick: copyRows }, "Copy CSV");
  async function copyRows() {
    try {
      await navigator.clipboard.writeText(asCsv(makeRows()));
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "No clipboard here";
    }
    setTimeout(() => (copy.textContent = "Copy CSV"), 2000);
  }
  function download() {
    const url = URL.createObjectURL(new Blob([asCsv(makeRows())], { type: "text/csv" }));
    make("a", { href: url, download: `${name}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }
  return make("span", { class: "csv" }, copy, make("button", { type: "button", onclick: download }, "Download CSV"));
}

// The first of many rows, and the others on demand.
function folded(rows, most = 12) {
  if (rows.length <= most + 2) return rows;
  return [
    ...rows.slice(0, most),
    make("details", {}, make("summary", {}, `${rows.length - most} more`), ...rows.slice(most)),
  ];
}

// A colour of the page's style sheet, in which dark mode has others.
function themed(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// Of a group's curve: its own, or grey where too many have one. Black and dark blue would not show on black.
function colorOf(style) {
  const instead = { "#000000": "ink", "#0072B2": "blue" };
  if (!style) return themed("other");
  return style.color in instead ? themed(instead[style.color]) : style.color;
}
