// The texts of one prompt at a time, chosen by tabs, keys or the address; tokens are shaded by their KL.

const SHADES = [0.1, 0.5, 1, 3]; // nats of the legend
const MOST_NAMED_TABS = 8; // where there are more prompts, a tab has its number alone
const state = { data: null, prompt: 0 };

function start(data) {
  state.data = data;
  setUpTheme(document.getElementById("theme"));
  setUpTooltip(document.getElementById("main"));
  const legend = document.querySelector(".shades");
  for (const kl of SHADES) legend.append(shaded(element("span", { text: kl }), kl));
  document.getElementById("tabs").append(...data.prompts.map(tab));
  addEventListener("hashchange", route);
  document.addEventListener("keydown", onKey);
  route();
}

function tab(prompt, i) {
  const button = element("button", { type: "button", role: "tab", id: `tab-${i}`, "aria-controls": "panel" }, `${i + 1}`);
  if (state.data.prompts.length <= MOST_NAMED_TABS) button.append(" ", element("bdi", { text: visible(prompt.slice(0, 80)) }));
  button.addEventListener("click", () => (location.hash = `prompt-${i + 1}`));
  return button;
}

function route() {
  const found = /^#prompt-(\d+)$/.exec(location.hash);
  const i = found ? Number(found[1]) - 1 : 0;
  state.prompt = i < state.data.prompts.length ? Math.max(0, i) : 0;
  showPrompt();
}

function showPrompt() {
  const { prompts, rows } = state.data;
  document.querySelectorAll("#tabs button").forEach((button, i) => {
    button.setAttribute("aria-selected", i === state.prompt);
    button.tabIndex = i === state.prompt ? 0 : -1;
  });
  const panel = document.getElementById("panel");
  panel.setAttribute("aria-labelledby", `tab-${state.prompt}`);
  const parts = prompts.length ? [element("p", { class: "prompt", dir: "auto", text: onItsLines(prompts[state.prompt]) })] : [];
  for (const { title, runs } of rows) {
    const texts = element("div", { class: "texts" }, ...runs.map((run) => oneText(state.data.runs[run])));
    parts.push(element("h3", { text: title }), texts);
  }
  panel.replaceChildren(...parts);
}

// A text as `visible` writes it, but broken where it breaks lines.
function onItsLines(text) {
  return visible(text).replaceAll("↵", "↵\n");
}

function oneText(run) {
  const head = element("h4", { text: run.name });
  if (run.holds) head.append(element("span", { class: "holds", text: " · texts of this dose hold on average" }));
  const card = element("section", { class: "one", "aria-label": run.name }, head);
  const text = run.texts[state.prompt];
  if (!text) card.append(element("p", { class: "none", text: "no text" }));
  else card.append(tokens(text), measures(text));
  return card;
}

function tokens({ pieces, kl, alphas, acts, ended }) {
  if (!pieces.length) return element("p", { class: "none", text: "nothing was written" });
  const text = element("div", { class: "text", dir: "auto" });
  pieces.forEach((piece, i) => {
    const isEnd = ended && !piece && i === pieces.length - 1; // the token that ends a text is written as nothing
    const span = shaded(element("span", { text: isEnd ? "[end]" : onItsLines(piece) }), kl[i]);
    span.facts = [`KL ${number(kl[i])}`, `alpha ${number(alphas[i])}`, `activation ${number(acts[i])}`, `token ${i + 1}`];
    appendToken(text, span);
  });
  return text;
}

// The shade rises with the KL and never quite ends, so that one far token does not hide all others.
function shaded(span, kl) {
  if (kl > 0) span.style.setProperty("--a", (0.7 * (1 - Math.exp(-kl))).toFixed(2));
  return span;
}

function measures({ measures, ended }) {
  const list = element("dl", {});
  const item = (name, value) => element("div", {}, element("dt", { text: name }), element("dd", { text: value }));
  for (const [name, value] of measures) list.append(item(name, name === "length" ? `${value}, ${ended ? "ended" : "cut off"}` : value));
  return list;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  const by = { j: 1, k: -1, ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const next = state.prompt + by;
  if (!by || next < 0 || next >= state.data.prompts.length) return;
  location.hash = `prompt-${next + 1}`;
  if (event.target.getAttribute("role") === "tab") document.getElementById(`tab-${next}`).focus();
  event.preventDefault();
}
