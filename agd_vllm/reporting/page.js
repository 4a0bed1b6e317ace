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

// The inspector

let looked = null;

function open(index, which, token) {
  if (!token) return;
  if (looked) looked.setAttribute("aria-pressed", "false");
  looked = token;
  token.setAttribute("aria-pressed", "true");
  const step = Number(token.dataset.step);
  const row = rowAt(index);
  const side = row.sides[which];
  const found = stepsOf(side).get(step);
  const dismiss = element("button", { type: "button", className: "close", "aria-label": "Close" }, "×");
  dismiss.addEventListener("click", leave);
  const where = [row.id, ...(row.sides.length > 1 ? [report.runs[which].name] : []), `step ${step}`].join(" · ");
  inspector.replaceChildren(element("header", {}, element("h3", {}, chip(side.answer[step])), element("p", { className: "facts" }, where), dismiss));
  if (found) inspector.append(...candidatesElements(found));
  else inspector.append(element("p", { className: "remark" }, "Not guided: the gate stayed shut here, or had one candidate only."));
  inspector.append(...mapElements(index, which, step, found));
  inspector.hidden = false;
  inspector.scrollTop = 0;
  for (const map of inspector.querySelectorAll(".map")) map.scrollTop = (map.querySelector(".region")?.offsetTop ?? 0) - 12;
  document.body.classList.add("inspecting");
}

function close() {
  inspector.hidden = true;
  document.body.classList.remove("inspecting");
  if (looked) looked.setAttribute("aria-pressed", "false");
  looked = null;
}

function leave() {
  const token = looked;
  close();
  if (token && token.isConnected) token.focus();
}

function candidatesElements(found) {
  const same = found.chosen === found.greedy;
  const largest = Math.max(...found.candidates.map(([, , , score]) => Math.abs(score ?? 0))) || 1;
  const lines = found.candidates.map(([id, text, probability, score]) => {
    const tags = [...(id === found.chosen ? ["chosen"] : []), ...(id === found.greedy ? ["greedy"] : [])];
    const likely = element("td", { className: "bar" }, element("span", {}, percent(probability)));
    likely.style.setProperty("--part", probability);
    const scored = element("td", { className: score < 0 ? "bar score negative" : "bar score" }, element("span", {}, signed(score)));
    scored.style.setProperty("--part", Math.abs(score ?? 0) / largest);
    const name = element("th", { scope: "row" }, chip(text), ...tags.map((tag) => element("span", { className: `tag ${tag}` }, tag)));
    name.title = `token ${id}`;
    return element("tr", { className: tags.join(" ") }, name, likely, scored);
  });
  const head = element("tr", {}, ...["candidate", "probability", "score"].map((name) => element("th", { scope: "col" }, name)));
  const verdict = same ? "guidance kept the greedy token" : "guidance changed the token";
  return [
    element("p", { className: "remark" }, `Entropy ${number(found.entropy)} nats; ${verdict}.`),
    element("table", { className: "candidates" }, element("thead", {}, head), element("tbody", {}, ...lines)),
  ];
}

// Heat maps

function decoded([scale, base64]) {
  const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
  const levels = new DataView(bytes.buffer);
  return Array.from({ length: bytes.length / 2 }, (_, at) => (scale * levels.getInt16(2 * at, true)) / 32767);
}

function mapElements(index, which, step, found) {
  const side = rowAt(index).sides[which];
  const maps = mapsOf(index)?.[which]?.[step];
  if (!maps) return [missingElement(which)];
  const context = [...side.prompt, ...side.answer.slice(0, step)];
  const named = Object.entries(maps).map(([id, values]) => ({ id: Number(id), values: decoded(values) }));
  const wanted = found ? [found.chosen, found.greedy] : named.map((map) => map.id);
  const shown = [...new Set(wanted)].flatMap((id) => named.filter((map) => map.id === id));
  const end = scaleEnd(side.prompt, shown.map((map) => map.values));
  const elements = shown.map(({ id, values }) => mapElement(side, context, values, end, titleOf(id, step, side, found)));
  return [...elements, element("p", { className: "facts scale" }, `${signed(-end)} or less `, element("span", { className: "ramp" }), ` ${signed(end)} or more`)];
}

/** One scale for both maps. The template's tokens and the last few gather most relevance: by these, words would be pale. */
function scaleEnd(prompt, maps) {
  const isWord = (_, at) => at < prompt.length && !special.has(prompt[at]) && report.texts[prompt[at]].trim();
  const sizes = maps.flatMap((values) => values.filter(isWord).map(Math.abs)).sort((a, b) => a - b);
  return sizes[Math.floor(0.97 * (sizes.length - 1))] || 1;
}

function titleOf(id, step, side, found) {
  if (!found) return [chip(side.answer[step])];
  const text = found.candidates.find(([candidate]) => candidate === id)[1];
  const tags = [...(id === found.chosen ? ["chosen"] : []), ...(id === found.greedy ? ["greedy"] : [])];
  return [chip(text), ...tags.map((tag) => element("span", { className: `tag ${tag}` }, tag))];
}

function mapElement(side, context, values, end, title) {
  const inRegion = covered(side.regions);
  const body = element("div", { className: "text map", dir: "auto", tabIndex: 0, role: "group", "aria-label": "Prompt and answer so far, token by token" });
  context.forEach((text, at) => {
    if (at === side.prompt.length) body.append(element("span", { className: "unseen" }, " Answer so far: "));
    const token = fill(element("span", { className: at < side.prompt.length ? "" : "said" }), text, false);
    token.title = `${signed(values[at])} at token ${at}`;
    token.classList.add(values[at] < 0 ? "against" : "for");
    if (inRegion.has(at)) token.classList.add("region");
    token.style.setProperty("--heat", Math.min(1, Math.abs(values[at]) / end).toFixed(3));
    token.dataset.relevance = values[at];
    body.append(token);
  });
  const strongest = values
    .map((value, at) => [value, at])
    .filter(([, at]) => !special.has(context[at]) && report.texts[context[at]].trim())
    .sort(([a], [b]) => Math.abs(b) - Math.abs(a))
    .slice(0, 5)
    .map(([value, at]) => `${quoted(report.texts[context[at]].trim())} ${signed(value)}`);
  const weight = (at) => side.regions.reduce((sum, [from, to, weight]) => sum + (at >= from && at < to ? weight : 0), 0);
  const sum = values.reduce((total, value, at) => total + weight(at) * value, 0);
  const facts = [...(side.regions.length ? [`region ${signed(sum)}`] : []), `strongest: ${strongest.join(", ")}`];
  return element("figure", { className: "heat" }, element("figcaption", {}, "Relevance for ", ...title), element("p", { className: "facts" }, facts.join(" · ")), body);
}

function missingElement(which) {
  const run = report.runs[which];
  const why = run.maps ? "No heat map of this step is in the page. More steps of each row get one by a larger --max-steps in" : "No heat map: this run's relevance has not been computed. First run";
  return element("p", { className: "remark missing" }, `${why} `, element("code", {}, run.command), ", then write this report again.");
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
