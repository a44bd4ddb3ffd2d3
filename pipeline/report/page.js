"use strict";
// The search among the pages of features.
(() => {
  const form = document.getElementById("find");
  if (!form) return;
  const field = form.elements.feature;
  const cards = [...document.querySelectorAll(".feature")];
  const items = [...document.querySelectorAll("[data-find]")];

  function update() {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const item of items) item.hidden = !words.every((word) => item.dataset.find.includes(word));
    const count = cards.filter((card) => !card.hidden).length;
    document.getElementById("found").textContent = words.length ? count + " of " + cards.length + " shown" : "";
  }

  // A link may lead to a feature that the search hides.
  window.addEventListener("hashchange", () => {
    const target = document.getElementById(location.hash.slice(1));
    if (!target || !target.hidden) return;
    field.value = "";
    update();
    target.scrollIntoView();
  });
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
})();

// The browser of samples. All text enters the page through textContent and cannot become markup.
(() => {
  const list = document.getElementById("list");
  if (!list) return;
  const form = document.getElementById("filters");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const { rows, names } = JSON.parse(document.getElementById("data").textContent);
  const PAGE_SIZE = 20;
  const INVISIBLE = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069\ufeff])/;
  let matching = [];

  function make(name, className, text) {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // Appends text by a model. Invisible characters, and those that change the text direction, are
  // shown by their code points.
  function appendText(element, text) {
    element.dir = "auto";
    for (const part of text.split(INVISIBLE)) {
      if (INVISIBLE.test(part)) {
        const code = part.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
        element.append(make("span", "code", "U+" + code));
      } else if (part) {
        element.append(document.createTextNode(part));
      }
    }
    return element;
  }

  const withMinus = (text) => text.replace("-", "−");
  const format = (value, digits) => (value === null || value === undefined ? "–"
    : withMinus(digits === undefined ? String(Number(value.toPrecision(3))) : value.toFixed(digits)));
  const change = (row) => (row.before && row.before.score !== null && row.after.score !== null
    ? row.after.score - row.before.score : null);
  const sides = (row) => (row.before ? [row.before, row.after] : [row.after]);
  // A feature: its number, followed by its name if it has one.
  const shown = (id) => (Object.hasOwn(names, id) ? id + ' "' + names[id] + '"' : String(id));
  const fired = (side) => Object.keys(side.penalties).filter((id) => side.penalties[id] > 0);

  // The rounded numbers in the table add up exactly: the rest is the rounded score minus the rounded
  // terms.
  function explanation(side) {
    const outside = Object.entries(side.outside || {});
    const parts = [...side.terms.map((term) => term[3]), ...outside.map(([, part]) => part)];
    const largest = Math.max(...parts.map(Math.abs), Math.abs(side.score));
    const digits = Math.min(12, Math.max(0, 3 - Math.floor(Math.log10(largest || 1))));
    const unit = 10 ** digits;
    const score = Math.round(side.score * unit);
    const rest = parts.reduce((sum, part) => sum - Math.round(part * unit), score);
    const table = make("table");
    const head = table.createTHead().insertRow();
    for (const [name, className] of [["feature"], ["z", "number"], ["w", "number"], ["z · w", "number"], [""]]) {
      const cell = make("th", className, name);
      cell.scope = "col";
      head.append(cell);
    }
    const body = table.createTBody();
    for (const [feature, z, w, term] of side.terms) {
      addRow(body, shown(feature), format(z), format(w), Math.round(term * unit) / unit);
    }
    for (const [name, part] of outside) {
      addRow(body, name, "", "", Math.round(part * unit) / unit);
    }
    addRow(body, "rest", "", "", rest / unit);
    addRow(table.createTFoot(), "score", "", "", score / unit);
    function addRow(section, name, z, w, value) {
      const row = section.insertRow();
      const first = make("th", "", name);
      first.scope = "row";
      row.append(first, make("td", "number", z), make("td", "number", w));
      row.append(make("td", "number part", format(value, digits)));
      const bar = make("div", value < 0 ? "minus" : "");
      bar.style.width = Math.min(100, (100 * Math.abs(value)) / (largest || 1)) + "%";
      row.append(make("td", "bar"));
      row.lastChild.append(bar);
    }
    const details = make("details");
    details.append(make("summary", "", "Why " + format(score / unit, digits)), table);
    return details;
  }

  // A response with its score, length and penalties.
  function responsePanel(title, side) {
    const panel = make("div");
    const facts = [title, "score " + format(side.score)];
    if (side.length !== null && side.length !== undefined) facts.push(format(side.length) + (side.length === 1 ? " token" : " tokens"));
    if (side.ended === false) facts.push("did not end");
    panel.append(make("h4", "", facts.join(" · ")));
    panel.append(appendText(make("p", "model-text"), side.text || "(nothing)"));
    const ids = fired(side);
    if (ids.length) {
      const penalties = ids.map((id) => "feature " + shown(id) + " (−" + format(side.penalties[id]) + ")");
      panel.append(make("p", "fired", "Penalty fired: " + penalties.join(", ")));
    } else if (Object.keys(side.penalties).length) {
      panel.append(make("p", "note", "No penalty fired."));
    }
    if (side.terms && side.score !== null) panel.append(explanation(side));
    return panel;
  }

  // A prompt is a text, or a list of turns.
  function appendPrompt(card, prompt) {
    if (typeof prompt === "string") {
      card.append(appendText(make("h3"), prompt));
      return;
    }
    card.append(make("h3", "", "Conversation of " + prompt.length + " turns"));
    for (const turn of prompt) {
      card.append(make("h4", "role", turn.role));
      card.append(appendText(make("p", "model-text"), turn.content));
    }
  }

  function article(row) {
    const card = make("article");
    appendPrompt(card, row.prompt);
    const difference = change(row);
    const facts = [row.run, row.origin];
    if (difference !== null) facts.push("score change " + (difference < 0 ? "" : "+") + format(difference));
    card.append(make("p", "note", facts.join(" · ")));
    const panels = make("div", "sides");
    if (row.before) panels.append(responsePanel("Before", row.before));
    panels.append(responsePanel(row.before ? "After" : "Response", row.after));
    card.append(panels);
    return card;
  }

  function matches(row, filters) {
    if (filters.run && row.run !== filters.run) return false;
    const ids = new Set(sides(row).flatMap(fired));
    if (filters.penalty === "any" && !ids.size) return false;
    if (filters.penalty === "none" && ids.size) return false;
    if (filters.penalty.startsWith("f") && !ids.has(filters.penalty.slice(1))) return false;
    const prompt = typeof row.prompt === "string" ? [row.prompt] : row.prompt.map((turn) => turn.content);
    const texts = [...prompt, ...sides(row).map((side) => side.text)];
    return texts.some((text) => text.toLowerCase().includes(filters.text));
  }

  function showMore() {
    const start = list.children.length;
    list.append(...matching.slice(start, start + PAGE_SIZE).map(article));
    more.hidden = list.children.length >= matching.length;
  }

  function update() {
    const value = (name) => form.elements[name].value;
    const filters = { run: value("run"), penalty: value("penalty"), text: value("text").toLowerCase() };
    matching = rows.filter((row) => matches(row, filters));
    if (value("order")) {
      const direction = value("order") === "up" ? -1 : 1;
      const isLast = (row) => (change(row) === null ? 1 : 0);  // rows without a change come last
      matching.sort((a, b) => isLast(a) - isLast(b) || direction * (change(a) - change(b)));
    }
    count.textContent = matching.length + " of " + rows.length + " shown";
    list.replaceChildren();
    showMore();
  }

  function addOptions(name, values, prefix, label) {
    for (const value of values) {
      const option = make("option", "", label(value));
      option.value = prefix + value;
      form.elements[name].append(option);
    }
  }

  const ids = new Set(rows.flatMap((row) => sides(row).flatMap((side) => Object.keys(side.penalties))));
  addOptions("run", new Set(rows.map((row) => row.run)), "", (run) => run);
  addOptions("penalty", [...ids].sort((a, b) => a - b), "f", (id) => "feature " + shown(id));
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    const start = list.children.length;
    showMore();
    const first = list.children[start];
    if (first) {
      first.tabIndex = -1;
      first.focus();
    }
  });
  form.hidden = false;
  update();
})();
