// One feature: its figures and charts, and the examples with their tokens.

const ROLES = ["user", "assistant", "system", "template", "special", "sink"]; // what a band tells apart; a kind has more words
const ROLE_NAMES = {
  user: "user", assistant: "assistant", system: "system prompt", template: "template", special: "special token", sink: "attention sink",
};
const TOP_FIRST = 8, INTERVAL_FIRST = 3; // windows that are shown at once
const SVG = "http://www.w3.org/2000/svg";

function roleOf(kind) {
  return /position_0|sink/.test(kind) ? "sink" : kind;
}

function showFeature(feature) {
  const main = document.getElementById("main");
  const figures = element("section", { class: "figures", "aria-label": "Figures" }, numbers(feature), ...roleParts(feature), activationChart(feature));
  const examples = element("section", { class: "examples", "aria-label": "Examples" }, ...exampleParts(feature));
  const others = element("section", { class: "others", "aria-label": "Logits and neighbours" });
  if (feature.logits) others.append(...logitParts(feature.logits));
  if (feature.nearest.length) others.append(...nearestParts(feature));
  main.replaceChildren(steps(feature), ...heading(feature), element("div", { class: "columns" }, figures, examples, others));
  document.title = `Feature ${feature.id}`;
  scrollTo(0, 0);
}

function steps(feature) {
  const hash = `#feature-${feature.id}`;
  const at = state.shown.indexOf(feature);
  const nav = element("nav", { class: "steps", "aria-label": "Features" }, element("a", { href: "#", text: "All features" }));
  for (const [by, text] of [[-1, "← Previous"], [1, "Next →"]]) {
    const other = at < 0 ? null : neighbourOf(hash, by);
    nav.append(other ? element("a", { href: `#feature-${other.id}`, text }) : element("span", { class: "off", text }));
    if (by < 0) nav.append(element("span", { class: "note", text: at < 0 ? "not in this search" : `${at + 1} of ${state.shown.length}` }));
  }
  return nav;
}

function heading(feature) {
  const parts = [element("h1", {}, element("small", { text: "Feature " }), String(feature.id))];
  const say = explanationOf(feature);
  say.classList.add("large");
  parts.push(element("p", { class: "explanation" }, say));
  if (feature.explanation) parts.push(element("p", { class: "note" }, "explained by ", element("code", { text: feature.explanation[1] })));
  if (feature.scores.length) parts.push(element("div", { class: "scores" }, ...feature.scores.map(scoreCard)));
  return parts;
}

// A score as a number and as a dot on a line, with its interval, and chance as a stroke.
function scoreCard([name, value, chance, low, high, least, most]) {
  const card = element("div", { class: "card" }, element("div", { class: "name", text: name }));
  card.append(element("div", { class: "value", text: number(value) }));
  const track = element("div", { class: "track", "aria-hidden": "true" });
  const place = (x) => `${100 * Math.min(1, Math.max(0, (x - least) / (most - least || 1)))}%`;
  const mark = (tag, left, right) => {
    const drawn = element("i", { class: tag });
    drawn.style.left = place(left);
    if (right !== undefined) drawn.style.right = `calc(100% - ${place(right)})`;
    track.append(drawn);
  };
  if (low !== null && high !== null) mark("range", low, high);
  if (chance !== null) mark("chance", chance);
  if (value !== null) mark("dot", value);
  const words = low !== null && high !== null ? [`95 %: ${number(low)} to ${number(high)}`] : [];
  if (chance !== null) words.push(`chance ${number(chance)}`);
  if (least !== 0 || most !== 1) words.push(`from ${number(least)} to ${number(most)}`);
  card.append(track, element("div", { class: "meaning", text: words.join(" · ") }));
  return card;
}

function numbers(feature) {
  const rows = [
    ["density", `${percent(feature.density)} of tokens`],
    ["fires on", `${feature.count.toLocaleString("en")} tokens`],
    ["maximum", number(feature.max)],
    ["special-token mean", number(feature.special)],
  ];
  const list = element("dl", {});
  for (const [name, value] of rows) list.append(element("dt", { text: name }), element("dd", { text: value }));
  return list;
}

// Whose the tokens are that were drawn at random from those on which the feature fires.
function roleParts(feature) {
  const drawn = feature.intervals.flatMap(([, , , inside]) => inside).map((place) => feature.windows[place]);
  const counts = Object.fromEntries(ROLES.map((role) => [role, 0]));
  for (const window of drawn) counts[roleOf(state.data.kinds[window[4][window[2]]])] += 1;
  if (!drawn.length) return [];
  const bar = element("div", { class: "role-bar", "aria-hidden": "true" });
  const words = element("p", { class: "note" }, `It fires (${drawn.length} random tokens) on `);
  ROLES.filter((role) => counts[role]).sort((a, b) => counts[b] - counts[a]).forEach((role, i) => {
    const part = element("i", { class: role });
    part.style.flexGrow = counts[role];
    bar.append(part);
    const share = `${ROLE_NAMES[role]} ${Math.round((100 * counts[role]) / drawn.length)} %`;
    words.append(i ? ", " : "", element("span", { class: `role ${role}`, text: share }));
  });
  return [bar, words];
}

function activationChart(feature) {
  const { edges, histogram } = feature;
  const isLog = edges[0] > 0 && edges.length > 2 && Math.abs(edges[1] / edges[0] / (edges[2] / edges[1]) - 1) < 0.05;
  const caption = `Tokens by activation${isLog ? ", on a logarithmic axis" : ""}`;
  return chart(edges, histogram, caption, () => "bar");
}

// Bars of equal width, a histogram whose edges are written below some of them.
function chart(edges, counts, caption, classOf) {
  const figure = element("figure", {});
  const most = Math.max(...counts, 0);
  if (!most) return element("figure", {}, element("figcaption", { text: "It fires on no token." }));
  const [width, height, bottom] = [320, 110, 16];
  const draw = (tag, attributes, text) => {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height + bottom}`, role: "img", "aria-label": caption });
  const step = width / counts.length;
  counts.forEach((count, i) => {
    const size = count ? Math.max(1, ((height - 14) * count) / most) : 0;
    const bar = draw("rect", { class: classOf(i), x: i * step + 0.5, y: height - size, width: Math.max(0.5, step - 1), height: size });
    bar.append(draw("title", {}, `${number(edges[i])} to ${number(edges[i + 1])}: ${count.toLocaleString("en")} tokens`));
    svg.append(bar);
  });
  svg.append(draw("path", { class: "axis", d: `M0 ${height}H${width}` }));
  svg.append(draw("text", { x: 0, y: 10 }, `${most.toLocaleString("en")} tokens`));
  for (const [share, anchor] of counts.length < 3 ? [[0, ""], [1, "end"]] : [[0, ""], [1 / 3, "mid"], [2 / 3, "mid"], [1, "end"]]) {
    const at = Math.round(share * counts.length);
    svg.append(draw("text", { class: anchor, x: at * step, y: height + 13 }, number(edges[at])));
  }
  figure.append(svg, element("figcaption", { text: caption }));
  return figure;
}

function logitParts(logits) {
  const most = Math.max(...[...logits.positive, ...logits.negative].map(([, value]) => Math.abs(value)), 1e-30);
  const list = (title, kind, rows) => {
    const items = element("ol", { class: `logits ${kind}` });
    for (const [token, value] of rows) {
      const text = visible(state.data.tokens[token]).replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
      const item = element("li", {}, element("bdi", { class: "text", text, title: text }), element("span", { text: number(value) }));
      item.style.setProperty("--a", (0.08 + 0.4 * Math.abs(value) / most).toFixed(2));
      items.append(item);
    }
    return element("div", {}, element("h3", { text: title }), items);
  };
  const sides = element("div", { class: "sides" });
  sides.append(list("Negative logits", "negative", logits.negative), list("Positive logits", "positive", logits.positive));
  const middle = (i) => (logits.edges[i] + logits.edges[i + 1]) / 2;
  return [
    sides,
    chart(logits.edges, logits.histogram, "All tokens of the vocabulary by logit", (i) => (middle(i) < 0 ? "bar negative" : "bar positive")),
  ];
}

function nearestParts(feature) {
  const rows = element("ol", { class: "nearest" });
  for (const [id, cosine] of feature.nearest) {
    const other = state.data.features.find((one) => one.id === id);
    const name = other ? element("a", { href: `#feature-${id}`, text: id }) : element("span", { class: "id", text: id });
    const say = other ? explanationOf(other) : element("span", { class: "say none", text: "not on this page" });
    rows.append(element("li", {}, name, say, element("span", { class: "value", text: number(cosine) })));
  }
  return [element("h3", { text: "Nearest features" }), element("p", { class: "note", text: "by cosine of the decoder rows" }), rows];
}

function exampleParts(feature) {
  const parts = [legend(feature), element("h2", { text: "Top activations" }), ...windows(feature, feature.top, TOP_FIRST)];
  if (feature.intervals.length) {
    const text = "Tokens drawn at random from those on which it fires, in intervals of equal width from 0 to the maximum. " +
      "The share of an interval is read off the histogram.";
    parts.push(element("h2", { text: "By strength" }), element("p", { class: "note", text }));
  }
  for (const [low, high, share, inside] of feature.intervals) {
    const head = element("h3", {}, `${number(low)} to ${number(high)}`, element("small", { text: ` about ${percent(share)} of the tokens it fires on` }));
    const none = share ? "None of the randomly drawn tokens lies here." : "It never fires like this.";
    parts.push(head, ...(inside.length ? windows(feature, inside, INTERVAL_FIRST) : [element("p", { class: "note", text: none })]));
  }
  return parts;
}

function legend(feature) {
  const used = new Set(feature.windows.flatMap((window) => [...new Set(window[4])].map((digit) => roleOf(state.data.kinds[digit]))));
  const line = element("p", { class: "legend", "aria-label": "Whose tokens the lines below them show" });
  for (const role of ROLES) if (used.has(role)) line.append(element("span", { class: `role ${role}`, text: ROLE_NAMES[role] }));
  return line;
}

// The first windows of a list, and a button for the others.
function windows(feature, places, first) {
  const shown = places.slice(0, first).map((place) => context(feature, feature.windows[place]));
  if (places.length <= first) return shown;
  const more = element("button", { type: "button", text: `Show ${places.length - first} more` });
  more.addEventListener("click", () => more.replaceWith(...windows(feature, places.slice(first), Infinity)));
  return [...shown, more];
}

function context(feature, window) {
  const text = element("div", { class: "text", dir: "auto" });
  for (let i = 0; i < window[3].length; i++) appendToken(text, tokenSpan(feature, window, i));
  const value = element("div", { class: "peak" }, number(window[5][window[2]]));
  return element("div", { class: "context" }, value, text);
}

function tokenSpan(feature, window, i) {
  const [dialogue, start, peak, tokens, kinds, acts] = window;
  const kind = state.data.kinds[kinds[i]];
  const span = element("span", { class: `role ${roleOf(kind)}`, text: visible(state.data.tokens[tokens[i]]) });
  if (acts[i] > 0) span.style.setProperty("--a", (0.08 + 0.57 * Math.min(1, acts[i] / (feature.max || 1))).toFixed(2));
  if (i === peak) span.classList.add("top");
  span.facts = [`activation ${number(acts[i])}`, `${kind.replaceAll("_", " ")}`, `dialogue ${dialogue}, token ${start + i}`];
  return span;
}
