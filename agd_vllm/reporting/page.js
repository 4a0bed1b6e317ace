"use strict";

// The page's data lie in inert JSON elements: one for the report, one a row, one for a row's heat maps. Each is parsed
// when it is first looked at. All text goes through text nodes, so nothing in a row can act.

const read = (id) => {
  const element = document.getElementById(id);
  return element && JSON.parse(element.textContent);
};
const report = read("report");
const special = new Set(report.special);
const byId = (id) => document.getElementById(id);
const rowsElement = byId("rows");
const inspector = byId("inspector");

const remembered = (make) => {
  const made = new Map();
  return (key) => {
    if (!made.has(key)) made.set(key, make(key));
    return made.get(key);
  };
};
const rowAt = remembered((index) => read(`row-${index}`));
const mapsOf = remembered((index) => read(`relevance-${index}`));

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const number = (value, digits = 3) => (value === null ? "NaN" : value.toFixed(digits));
const signed = (value) => (value === null ? "NaN" : (value > 0 ? "+" : value < 0 ? "−" : "") + significant(Math.abs(value)));
const significant = (value) => (value === 0 ? "0" : value >= 1e-3 && value < 1e4 ? value.toPrecision(3) : value.toExponential(2));
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
const quoted = (text) => `“${text.replace(/\n/g, "↵")}”`;

// Text

/** A token's text; a newline and a token without text of its own get a mark, or there would be nothing to click. */
function fill(target, text, marked) {
  if (special.has(text)) target.classList.add("special");
  const shown = report.texts[text];
  if (marked && shown === "") target.append(element("i", { className: "mark" }, "·"));
  for (const [index, line] of shown.split("\n").entries()) {
    if (index > 0) target.append(...(marked ? [element("i", { className: "mark" }, "↵")] : []), "\n");
    target.append(line);
  }
  return target;
}

const chip = (text) => fill(element("span", { className: "chip" }), text, true);

const plain = remembered((index) => {
  const row = rowAt(index);
  const joined = row.sides.flatMap((side) => (side ? [...side.prompt, "\n", ...side.answer, "\n"] : []));
  return `${row.id}\n${joined.map((text) => report.texts[text] ?? text).join("")}`.toLowerCase();
});

// Answers

const stepsOf = (side) => new Map(side.guided.map(([step, entropy, candidates, chosen, greedy]) => [step, { entropy, candidates, chosen, greedy }]));

function covered(ranges) {
  const inside = new Set();
  for (const [start, end] of ranges) for (let at = start; at < end; at++) inside.add(at);
  return inside;
}

function answerElement(index, which) {
  const row = rowAt(index);
  const side = row.sides[which];
  const steps = stepsOf(side);
  const relevant = new Set(side.relevant);
  const [low, high] = report.entropy[which];
  const differing = covered(row.differs ? row.differs.ranges[which] : []);
  const guided = plural(steps.size, "guided step");
  const answer = element("div", { className: "answer", dir: "auto", role: "group", "aria-label": `Answer of ${row.id}, ${guided}` });
  side.answer.forEach((text, step) => {
    const token = element("span", { className: "token" });
    const found = steps.get(step);
    const opens = found || relevant.has(step);
    fill(token, text, opens || differing.has(step));
    if (found) {
      token.classList.add("guided");
      token.style.setProperty("--shade", ((found.entropy - low) / (high - low || 1)).toFixed(3));
      if (found.chosen !== found.greedy) token.classList.add("changed");
    }
    if (differing.has(step)) token.classList.add("differs");
    if (opens) {
      const what = found ? `guided, entropy ${number(found.entropy, 2)}${found.chosen !== found.greedy ? ", changed" : ""}` : "not guided";
      token.setAttribute("role", "button");
      token.setAttribute("aria-label", `${report.texts[text].trim() || "white space"}, step ${step}, ${what}`);
      token.setAttribute("aria-pressed", "false");
      token.tabIndex = answer.querySelector("[role=button]") ? -1 : 0; // one stop for Tab, arrows within
      token.dataset.step = step;
    }
    answer.append(token);
  });
  answer.addEventListener("click", (event) => open(index, which, event.target.closest("[role=button]")));
  answer.addEventListener("keydown", (event) => walk(index, which, event));
  return answer;
}

function walk(index, which, event) {
  const token = event.target.closest("[role=button]");
  if (!token) return;
  if (event.key === "Enter" || event.key === " ") open(index, which, token);
  else if (["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) {
    const tokens = [...token.parentElement.querySelectorAll("[role=button]")];
    const at = tokens.indexOf(token);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tokens.length - 1 }[event.key];
    const next = tokens[Math.max(0, Math.min(tokens.length - 1, to))];
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    if (!inspector.hidden) open(index, which, next);
  } else return;
  event.preventDefault();
}

function promptElement(side) {
  const inRegion = covered(side.regions);
  const size = inRegion.size ? `, ${inRegion.size.toLocaleString("en")} in the region` : "";
  const prompt = element("details", { className: "prompt" }, element("summary", {}, `Prompt · ${plural(side.prompt.length, "token")}${size}`));
  prompt.addEventListener("toggle", () => {
    if (prompt.children.length > 1) return;
    const body = element("div", { className: "text", dir: "auto" });
    side.prompt.forEach((text, at) => body.append(fill(element("span", { className: inRegion.has(at) ? "region" : "" }), text, false)));
    prompt.append(body);
  });
  return prompt;
}

function sideElement(index, which) {
  const row = rowAt(index);
  const side = row.sides[which];
  const made = element("section", { className: "side" });
  if (row.sides.length > 1) made.append(element("h4", {}, report.runs[which].name));
  if (!side) {
    made.append(element("p", { className: "empty" }, "This run has no such row."));
    return made;
  }
  const changed = side.guided.filter(([, , , chosen, greedy]) => chosen !== greedy).length;
  const facts = [plural(side.answer.length, "token"), `${side.guided.length} guided`, `${changed} changed`, `ended by ${side.finish}`];
  made.append(element("p", { className: "facts" }, facts.join(" · ")), promptElement(side), answerElement(index, which));
  if (side.metadata !== "null") made.append(element("p", { className: "metadata" }, side.metadata));
  return made;
}

function rowElement(index) {
  const row = rowAt(index);
  const head = element("header", {}, element("h3", {}, row.id));
  if (row.sides.length > 1 && row.sides[1]) {
    const first = row.differs.first;
    head.append(element("p", { className: first === null ? "facts" : "verdict" }, first === null ? "same tokens" : `first difference at token ${first}`));
  }
  const sides = element("div", { className: "sides" }, ...row.sides.map((_, which) => sideElement(index, which)));
  return element("article", { className: "row" }, head, sides);
}

// Pages

const view = { matching: [], page: 0 };

const filters = {
  all: () => true,
  guided: (row) => row.sides.some((side) => side && side.guided.length),
  changed: (row) => row.sides.some((side) => side && side.guided.some(([, , , chosen, greedy]) => chosen !== greedy)),
  differs: (row) => !row.differs || row.differs.first !== null,
};

function search() {
  const words = byId("search").value.trim().toLowerCase();
  const keep = filters[byId("filter").value];
  view.matching = [...Array(report.rows).keys()].filter((index) => (!words || plain(index).includes(words)) && (keep === filters.all || keep(rowAt(index))));
  view.page = 0;
  show();
}

function show() {
  close();
  const pages = Math.max(1, Math.ceil(view.matching.length / report.page));
  const start = view.page * report.page;
  const indices = view.matching.slice(start, start + report.page);
  rowsElement.replaceChildren(...indices.map(rowElement));
  if (!indices.length) rowsElement.append(element("p", { className: "empty" }, "No row matches."));
  byId("count").textContent = indices.length ? `${start + 1}–${start + indices.length} of ${plural(view.matching.length, "row")}` : "0 rows";
  byId("place").textContent = `${view.page + 1} / ${pages}`;
  byId("previous").disabled = view.page === 0;
  byId("next").disabled = view.page === pages - 1;
}

function turn(by) {
  view.page += by;
  show();
  byId("answers").scrollIntoView();
}

// Start

let waiting = 0;
byId("search").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(search, 120);
});
byId("filter").addEventListener("change", search);
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !inspector.hidden) leave();
});
search();
performance.mark("shown");
