"use strict";
// What pages with a script share: their data, elements, numbers, texts of tokens, light and dark, and what a token says of itself.
// Texts of models and of dialogues enter a page through textContent alone.

async function unpack() {
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function number(x) {
  if (x === null || x === undefined) return "n/a";
  const size = Math.abs(x);
  const text = size && size < 1e-3 ? x.toExponential(1) : size >= 1000 ? Math.round(x).toLocaleString("en") : String(+x.toPrecision(3));
  return text.replaceAll("-", "−");
}

function percent(share) {
  return share === null ? "n/a" : `${number(100 * share)} %`;
}

// Signs for what would not be seen, or would turn the text around it.
function visible(text) {
  const shown = text.replace(/\n/g, "↵").replace(/\r/g, "␍").replace(/\t/g, "⇥")
    .replace(/[\u0000-\u001f\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, codePoint);
  return /^[\u00ad\u200b-\u200d\u2060-\u2064]*$/.test(shown) ? shown.replace(/./gu, codePoint) || "∅" : shown;
}

function codePoint(sign) {
  return `[U+${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`;
}

// Adds a token to a text. A word goes to the next line whole, so that its shading does not leave the space before it behind.
function appendToken(text, span) {
  if (/^ .{1,30}$/.test(span.textContent)) {
    span.classList.add("whole");
    text.append(document.createElement("wbr"));
  }
  text.append(span);
}

function setUpTheme(button) {
  const root = document.documentElement;
  const remembered = memory("fastsae-theme");
  if (remembered === "light" || remembered === "dark") root.dataset.theme = remembered;
  const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark() ? "Switch to light colours" : "Switch to dark colours");
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    memory("fastsae-theme", root.dataset.theme);
    label();
  });
  label();
}

// Storage of the browser, which a page from a file or in a strict browser may not have.
function memory(key, value) {
  try {
    if (value !== undefined) localStorage.setItem(key, value);
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

// A token under the pointer, or touched, shows what it is.
function setUpTooltip(main) {
  const tip = element("div", { class: "tip", role: "tooltip", hidden: "" });
  document.body.append(tip);
  const hide = () => (tip.hidden = true);
  const show = (event) => {
    const { facts, textContent } = event.target;
    if (!facts) return hide();
    tip.replaceChildren(element("bdi", { class: "text", text: textContent }), ...facts.map((text) => element("div", { text })));
    tip.hidden = false;
    const [token, box] = [event.target.getClientRects()[0], tip.getBoundingClientRect()];
    const below = token.bottom + 6 + box.height < innerHeight;
    tip.style.top = `${below ? token.bottom + 6 : Math.max(4, token.top - 6 - box.height)}px`;
    tip.style.left = `${Math.max(4, Math.min(token.left, document.documentElement.clientWidth - box.width - 4))}px`;
  };
  main.addEventListener("pointerover", show);
  main.addEventListener("click", show);
  main.addEventListener("pointerleave", hide);
  addEventListener("scroll", hide, { passive: true });
  addEventListener("hashchange", hide);
}
