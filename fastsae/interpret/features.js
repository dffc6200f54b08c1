// The list of features, and what moves between it and a feature: search, order, keys, links, light and dark.

const ROWS_AT_ONCE = 200;
const SNIPPET = 28; // tokens of a window in the list at most
const state = { data: null, shown: [], order: "id up", query: "", rows: ROWS_AT_ONCE, last: null };

function start(data) {
  state.data = data;
  for (const feature of data.features) feature.found = searchText(feature);
  setUpBar();
  addEventListener("hashchange", route);
  document.addEventListener("keydown", onKey);
  setUpTooltip(document.getElementById("main"));
  select();
  route();
}

// All that a search looks through, in lower case: the explanation, the tokens of the peaks and the raised ones.
function searchText(feature) {
  const peaks = feature.windows.map((window) => window[3][window[2]]);
  const raised = feature.logits ? feature.logits.positive.map(([token]) => token) : [];
  const words = [...new Set([...peaks, ...raised])].map((token) => state.data.tokens[token]);
  return [feature.explanation ? feature.explanation[0] : "", ...words].join("\n").toLowerCase();
}

function setUpBar() {
  const search = document.getElementById("search");
  search.addEventListener("input", () => {
    state.query = search.value;
    select();
    if (location.hash) location.hash = "";
    else showList();
  });
  const order = document.getElementById("order");
  for (const [value, text] of orders()) order.append(element("option", { value, text }));
  order.addEventListener("change", () => {
    state.order = order.value;
    select();
    route();
  });
  setUpTheme(document.getElementById("theme"));
}

function orders() {
  const keys = [["density", "density"], ["special", "special-token mean"], ...scoreNames().map((name) => [`score ${name}`, name])];
  return [
    ["id up", "by number"],
    ...keys.flatMap(([key, text]) => [[`${key} down`, `by ${text}, highest first`], [`${key} up`, `by ${text}, lowest first`]]),
  ];
}

// Which features are shown, and in which order: what the query matches, and the order's key.
function select() {
  const query = state.query.trim().toLowerCase();
  const number = /^#?\d+$/.test(query) ? query.replace("#", "") : null;
  const matches = (feature) => !query || feature.found.includes(query) || (number && String(feature.id).startsWith(number));
  const at = state.order.lastIndexOf(" ");
  const key = state.order.slice(0, at);
  const sign = state.order.slice(at + 1) === "up" ? 1 : -1;
  const value = (feature) => (key.startsWith("score ") ? scoreOf(feature, key.slice(6)) : feature[key]);
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null) || a.id - b.id; // what is not known stands last
    return sign * (x - y) || a.id - b.id;
  };
  state.shown = state.data.features.filter(matches).sort(compare);
  if (number) state.shown.sort((a, b) => (String(b.id) === number) - (String(a.id) === number));
  state.rows = ROWS_AT_ONCE;
}

function scoreOf(feature, name) {
  const score = feature.scores.find(([other]) => other === name);
  return score ? score[1] : null;
}

function route() {
  const found = /^#feature-(\d+)$/.exec(location.hash);
  const feature = found && state.data.features.find(({ id }) => id === Number(found[1]));
  if (feature) {
    state.last = feature.id;
    showFeature(feature);
  } else showList(found ? `Feature ${found[1]} is not among the ${state.data.features.length} features of this page.` : "");
}

function showList(note = "") {
  const main = document.getElementById("main");
  const { title, facts, warnings } = state.data.header;
  const lead = element("p", { class: "lead" });
  facts.forEach(([name, value], i) => lead.append(i ? " · " : "", `${name} `, element("code", { text: value })));
  const list = element("ul", { class: "rows" });
  for (const feature of state.shown.slice(0, state.rows)) list.append(row(feature));
  const heads = element("div", { class: "facts", "aria-hidden": "true" }, ...columns().map(([text]) => element("span", { text })));
  const n = state.shown.length;
  const count = state.query.trim() ? `${n} of ${state.data.features.length} features match` : `${n} features`;
  main.replaceChildren(
    element("h1", { text: title }),
    lead,
    ...[note, ...warnings].filter(Boolean).map((text) => element("p", { class: "warnings", role: "note", text })),
    element("div", { class: "above" }, element("p", { class: "note", role: "status", text: count }), heads),
    list,
  );
  if (n > state.rows) {
    const more = element("button", { type: "button", text: `Show ${Math.min(ROWS_AT_ONCE, n - state.rows)} more` });
    more.addEventListener("click", () => {
      state.rows += ROWS_AT_ONCE;
      showList(note);
    });
    main.append(more);
  }
  document.title = title;
  const left = document.querySelector(`.rows a[href="#feature-${state.last}"]`);
  state.last = null;
  if (left) { // who comes back from a feature finds its place in the list
    left.scrollIntoView({ block: "center" });
    left.focus({ preventScroll: true });
  }
}

function row(feature) {
  const link = element("a", { href: `#feature-${feature.id}` });
  link.append(element("span", { class: "id", text: feature.id }), explanationOf(feature));
  const facts = element("div", { class: "facts" });
  for (const [name, value] of columns()) facts.append(element("span", {}, element("small", { text: name }), " ", element("b", { text: value(feature) })));
  const item = element("li", {}, link, facts);
  if (feature.top.length) item.append(snippet(feature, feature.windows[feature.top[0]]));
  return item;
}

function explanationOf(feature) {
  const text = feature.explanation && feature.explanation[0].trim();
  return element("span", text ? { class: "say", dir: "auto", text } : { class: "say none", text: "no explanation" });
}

// Name and text of the figures in the list: the first of the scores, density, and the mean on special tokens.
function columns() {
  const [score] = scoreNames();
  const figures = [["density", (feature) => percent(feature.density)], ["special-token mean", (feature) => number(feature.special)]];
  return score === undefined ? figures : [[score, (feature) => number(scoreOf(feature, score))], ...figures];
}

function scoreNames() {
  return [...new Set(state.data.features.flatMap((feature) => feature.scores.map(([name]) => name)))];
}

// The tokens around the peak of a window on one line, shaded.
function snippet(feature, window) {
  const peak = window[2];
  const line = element("div", { class: "text snippet", dir: "auto" });
  const first = Math.max(0, peak - (innerWidth < 700 ? 3 : 10));
  for (let i = first; i < Math.min(window[3].length, first + SNIPPET); i++) line.append(tokenSpan(feature, window, i));
  return line;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const search = document.getElementById("search");
  if (event.target.closest("input, select")) {
    if (event.key === "Escape") {
      if (event.target === search && search.value) {
        search.value = "";
        search.dispatchEvent(new Event("input"));
      }
      event.target.blur();
    }
    return;
  }
  const moves = { j: 1, k: -1, ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 };
  if (event.key === "/") {
    search.focus();
    search.select();
  } else if (event.key === "Escape") {
    location.hash = "";
  } else if (!(event.key in moves)) {
    return;
  } else if (!location.hash) {
    focusRow(moves[event.key]);
  } else if (/^(j|k|ArrowRight|ArrowLeft)$/.test(event.key)) {
    step(moves[event.key]);
  } else {
    return; // up and down scroll in a feature
  }
  event.preventDefault();
}

function step(by) {
  const next = neighbourOf(location.hash, by);
  if (next) location.hash = `feature-${next.id}`;
}

// The feature that stands before (-1) or behind (1) the one of a link in the list as it is ordered and searched now.
function neighbourOf(hash, by) {
  const at = state.shown.findIndex(({ id }) => `#feature-${id}` === hash);
  return at < 0 ? state.shown[0] : state.shown[at + by];
}

function focusRow(by) {
  const links = [...document.querySelectorAll(".rows a")];
  const at = links.indexOf(document.activeElement);
  const next = links[at < 0 ? 0 : Math.min(links.length - 1, Math.max(0, at + by))];
  if (next) next.focus();
}
