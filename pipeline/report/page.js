"use strict";
// The sample browser. Every text is put in with textContent: nothing in it can become markup.
(() => {
  const list = document.getElementById("list");
  if (!list) return;
  const form = document.getElementById("filters");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const rows = JSON.parse(document.getElementById("data").textContent).rows;
  const STEP = 20;
  const ODD = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069\ufeff])/;
  let found = [];

  function make(name, className, text) {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // Text that a model wrote. Characters that cannot be seen, or that turn the direction of what
  // follows, are shown by their number.
  function said(element, text) {
    element.dir = "auto";
    for (const part of text.split(ODD)) {
      if (ODD.test(part)) {
        const code = part.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
        element.append(make("span", "code", "U+" + code));
      } else if (part) {
        element.append(document.createTextNode(part));
      }
    }
    return element;
  }

  const sign = (text) => text.replace("-", "−");
  const shown = (value, digits) => (value === null || value === undefined ? "–"
    : sign(digits === undefined ? String(Number(value.toPrecision(3))) : value.toFixed(digits)));
  const change = (row) => (row.before && row.before.score !== null && row.after.score !== null
    ? row.after.score - row.before.score : null);
  const sides = (row) => (row.before ? [row.before, row.after] : [row.after]);
  const fired = (side) => Object.keys(side.penalties).filter((id) => side.penalties[id] > 0);

  // What is shown adds up as shown: the rest is what the shown terms leave of the shown score.
  function explanation(side) {
    const largest = Math.max(...side.terms.map((term) => Math.abs(term[3])), Math.abs(side.score));
    const digits = Math.min(12, Math.max(0, 3 - Math.floor(Math.log10(largest || 1))));
    const unit = 10 ** digits;
    const whole = Math.round(side.score * unit);
    const left = side.terms.reduce((rest, term) => rest - Math.round(term[3] * unit), whole);
    const table = make("table");
    const head = table.createTHead().insertRow();
    for (const [name, className] of [["feature"], ["z", "number"], ["w", "number"], ["z · w", "number"], [""]]) {
      const cell = make("th", className, name);
      cell.scope = "col";
      head.append(cell);
    }
    const body = table.createTBody();
    for (const [feature, z, w, part] of side.terms) {
      line(body, String(feature), shown(z), shown(w), Math.round(part * unit) / unit);
    }
    line(body, "rest", "", "", left / unit);
    line(table.createTFoot(), "score", "", "", whole / unit);
    function line(place, name, z, w, value) {
      const row = place.insertRow();
      const first = make("th", "", name);
      first.scope = "row";
      row.append(first, make("td", "number", z), make("td", "number", w));
      row.append(make("td", "number part", shown(value, digits)));
      const bar = make("div", value < 0 ? "minus" : "");
      bar.style.width = Math.min(100, (100 * Math.abs(value)) / (largest || 1)) + "%";
      row.append(make("td", "bar"));
      row.lastChild.append(bar);
    }
    const details = make("details");
    details.append(make("summary", "", "Why " + shown(whole / unit, digits)), table);
    return details;
  }

  function half(title, side) {
    const part = make("div");
    const facts = [title, "score " + shown(side.score)];
    if (side.length !== null && side.length !== undefined) facts.push(shown(side.length) + (side.length === 1 ? " token" : " tokens"));
    if (side.ended === false) facts.push("did not end");
    part.append(make("h4", "", facts.join(" · ")));
    part.append(said(make("p", "said"), side.text || "(nothing)"));
    const ids = fired(side);
    if (ids.length) {
      const each = ids.map((id) => "feature " + id + " (−" + shown(side.penalties[id]) + ")");
      part.append(make("p", "fired", "Penalty fired: " + each.join(", ")));
    } else if (Object.keys(side.penalties).length) {
      part.append(make("p", "note", "No penalty fired."));
    }
    if (side.terms && side.score !== null) part.append(explanation(side));
    return part;
  }

  function article(row) {
    const card = make("article");
    card.append(said(make("h3"), row.prompt));
    const difference = change(row);
    const told = [row.run, row.origin];
    if (difference !== null) told.push("score change " + (difference < 0 ? "" : "+") + shown(difference));
    card.append(make("p", "note", told.join(" · ")));
    const both = make("div", "sides");
    if (row.before) both.append(half("Before", row.before));
    both.append(half(row.before ? "After" : "Response", row.after));
    card.append(both);
    return card;
  }

  function matches(row, wanted) {
    if (wanted.run && row.run !== wanted.run) return false;
    const ids = new Set(sides(row).flatMap(fired));
    if (wanted.penalty === "any" && !ids.size) return false;
    if (wanted.penalty === "none" && ids.size) return false;
    if (wanted.penalty.startsWith("f") && !ids.has(wanted.penalty.slice(1))) return false;
    const texts = [row.prompt, ...sides(row).map((side) => side.text)];
    return texts.some((text) => text.toLowerCase().includes(wanted.text));
  }

  function extend() {
    const start = list.children.length;
    list.append(...found.slice(start, start + STEP).map(article));
    more.hidden = list.children.length >= found.length;
  }

  function update() {
    const value = (name) => form.elements[name].value;
    const wanted = { run: value("run"), penalty: value("penalty"), text: value("text").toLowerCase() };
    found = rows.filter((row) => matches(row, wanted));
    if (value("order")) {
      const sense = value("order") === "up" ? -1 : 1;
      const last = (row) => (change(row) === null ? 1 : 0);  // nothing to compare with
      found.sort((a, b) => last(a) - last(b) || sense * (change(a) - change(b)));
    }
    count.textContent = found.length + " of " + rows.length + " shown";
    list.replaceChildren();
    extend();
  }

  function choices(name, values, prefix, words) {
    for (const value of values) {
      const option = make("option", "", words + value);
      option.value = prefix + value;
      form.elements[name].append(option);
    }
  }

  const ids = new Set(rows.flatMap((row) => sides(row).flatMap((side) => Object.keys(side.penalties))));
  choices("run", new Set(rows.map((row) => row.run)), "", "");
  choices("penalty", [...ids].sort((a, b) => a - b), "f", "feature ");
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    const start = list.children.length;
    extend();
    const first = list.children[start];
    if (first) {
      first.tabIndex = -1;
      first.focus();
    }
  });
  form.hidden = false;
  update();
})();
