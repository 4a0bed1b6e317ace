"use strict";

// What a click on a token shows: its candidates, and what in the prompt spoke for them. Needs page.js.

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
  if (run.command === null) {
    return element("p", { className: "remark missing" }, "No heat map: attribution explains the logits of the model itself, which did not choose this run's tokens.");
  }
  const why = run.maps ? "No heat map of this step is in the page. More steps of each row get one by a larger --max-steps in" : "No heat map: this run's relevance has not been computed. First run";
  return element("p", { className: "remark missing" }, `${why} `, element("code", {}, run.command), ", then write this report again.");
}
