"use strict";
const $ = (id) => document.getElementById(id);
const facts = JSON.parse($("facts").textContent);
const HISTORY = "kvcompress.history", DRAFT = "kvcompress.draft";
const FIELDS = ["prompt", "negative", "n", "seed", "guidance", "size", "every"];
const MOST = 30; // entries of the history

const make = (tag, props = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
};
const stored = (area, name, otherwise) => {
  try { return JSON.parse(area.getItem(name)) ?? otherwise; } catch { return otherwise; }
};
const keep = (area, name, value) => {
  try { area.setItem(name, JSON.stringify(value)); } catch { /* a full or forbidden store: nothing is kept */ }
};
const bytes = (count) => count >= 2 ** 20 ? `${(count / 2 ** 20).toFixed(1)} MiB` : `${(count / 1024).toFixed(0)} KiB`;

// Addresses of this server are relative to the page's: a proxy may have put both under a prefix.
const servers = [{ name: "this server", url: "", key: "key" }];
if (facts.compare) servers.push({ name: facts.compare, url: `${facts.compare}/`, key: "otherkey" });
let running = null; // the AbortController of what is being drawn

$("about").textContent = `${facts.model}, ${facts.sizes[0]}, ${facts.cache}`;
$("size").append(...facts.sizes.map((size) => make("option", { value: size, textContent: size })));
$("guidance").placeholder = facts.guidance_scale;
// A key is kept for the server that it was given for: a link to this page may name another one.
for (const { url, key } of servers) {
  const name = `kvcompress.key ${url}`;
  $(key).value = stored(sessionStorage, name, "");
  $(key).addEventListener("change", () => keep(sessionStorage, name, $(key).value));
}
const compared = new URLSearchParams(location.search).get("compare")?.trim() ?? "";
$("compare").value = facts.compare ?? compared;
$("otherkey").disabled = !facts.compare;
if (facts.compare) $("about").append(`; draws at ${facts.compare} as well`);
else if (compared) $("error").textContent = `No second server: ${compared} is no address like http://localhost:8001.`;
if (compared) $("more").open = true;
fill(stored(sessionStorage, DRAFT, {}));
ready(true);

function fill(fields) {
  for (const id of FIELDS) if (id in fields) $(id).value = fields[id];
  if (!$("size").value) $("size").value = facts.sizes[0]; // an older entry may be of a size that is gone
}
// Never disabled: a browser takes the focus from a disabled button, and with it a keyboard's place.
function ready(now) {
  $("draw").setAttribute("aria-disabled", !now);
  $("stop").setAttribute("aria-disabled", now);
}
function fields() {
  return Object.fromEntries(FIELDS.map((id) => [id, $(id).value]));
}

$("connect").addEventListener("click", () => {
  keep(sessionStorage, DRAFT, fields());
  const url = $("compare").value.trim();
  location.href = location.pathname + (url ? `?compare=${encodeURIComponent(url)}` : "");
});
$("stop").addEventListener("click", () => running?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("form").addEventListener("submit", (event) => { event.preventDefault(); draw(); });

async function draw() {
  if (running) return;
  const asked = fields(), count = Number(asked.n) || 1;
  // An empty seed is chosen here, so that the history can draw the picture again.
  const seed = asked.seed === "" ? Math.floor(Math.random() * 2 ** 31) : Number(asked.seed);
  running = new AbortController();
  ready(false);
  $("error").textContent = ""; $("status").textContent = "Drawing…";
  $("results").replaceChildren();
  const jobs = [];
  for (let index = 0; index < count; index++) {
    const pair = make("div", { className: "pair" });
    $("results").append(pair);
    for (const server of servers) {
      const view = new View(server, seed + index, asked.size);
      pair.append(view.figure);
      jobs.push(picture(server, body(asked, seed + index), view, running.signal));
    }
  }
  const outcomes = await Promise.allSettled(jobs);
  const stopped = running.signal.aborted;
  running = null;
  ready(true);
  const whole = outcomes.flatMap((outcome) => outcome.status === "fulfilled" ? [outcome.value] : []);
  $("status").textContent = stopped ? "Stopped." : whole.length ? `Done: ${whole.length} of ${jobs.length}.` : "";
  const failed = outcomes.find((outcome) => outcome.status === "rejected" && !stopped);
  if (failed) {
    $("error").textContent = failed.reason.message;
    if (failed.reason.key) { $("more").open = true; $(failed.reason.key).focus(); }
    if (failed.reason.gone) waitFor(failed.reason.gone);
  }
  if (whole.length) remember({ ...asked, seed }, whole[0]);
}

function body(asked, seed) {
  const sent = { prompt: asked.prompt, seed, size: asked.size, stream: true };
  if (asked.negative.trim()) sent.negative_prompt = asked.negative;
  if (asked.guidance !== "") sent.guidance_scale = Number(asked.guidance);
  if (asked.every) Object.assign(sent, { partial_lines: Number(asked.every), kept: true });
  return sent;
}

class Refused extends Error {
  constructor(message, more = {}) { super(message); Object.assign(this, more); }
}

async function picture(server, sent, view, signal) {
  const started = performance.now();
  const said = (text) => servers.length > 1 ? `${server.name}: ${text}` : text;
  const headers = { "Content-Type": "application/json" };
  if ($(server.key).value) headers.Authorization = `Bearer ${$(server.key).value}`;
  try {
    const answer = await fetch(`${server.url}v1/images/generations`, { method: "POST", headers, body: JSON.stringify(sent), signal });
    if (!answer.ok) {
      const told = await answer.json().catch(() => null);
      const error = told?.error?.message ?? told?.error ?? `the server answered ${answer.status}`;
      throw new Refused(said(error), answer.status === 401 ? { key: server.key } : {});
    }
    for await (const event of events(answer.body)) {
      if (event.type === "error") throw new Refused(said(event.error?.message ?? event.message ?? "the picture failed"));
      view.show(event);
      if (event.type === "image_generation.completed") {
        view.done(event, (performance.now() - started) / 1000);
        return event.b64_json;
      }
    }
    throw new Refused(said("the connection ended before the picture did"), { gone: server });
  } catch (error) {
    view.caption.textContent = signal.aborted ? "stopped" : "not drawn";
    if (!(error instanceof TypeError)) throw error;
    if (!server.url || !await alive(server)) throw new Refused(said("the server can't be reached"), { gone: server });
    // A browser hides why it may not read an answer: vLLM lets no other page read any, unless told so, and none
    // at all read what it says of a wrong key.
    const readable = await fetch(`${server.url}health`).then(() => true, () => false);
    if (readable) throw new Refused(said("it refuses this page: is its API key right?"), { key: server.key });
    throw new Refused(said(`it lets this page read no answer; start it with --allowed-origins '["${location.origin}"]'`));
  }
}

// Server-sent events of a response body: their data, as JSON.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const whole = text.split(/\r?\n\r?\n/);
    text = whole.pop();
    for (const block of whole) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
      if (data.trim()) yield JSON.parse(data);
    }
  }
}

class View {
  constructor(server, seed, size) {
    const [width, height] = size.split("x");
    this.seed = seed;
    this.image = make("img", { alt: `picture of seed ${seed}, not begun`, width, height });
    this.image.style.setProperty("--ratio", `${width} / ${height}`);
    this.caption = make("figcaption", { textContent: "waiting" });
    this.rasters = make("div", { className: "kept" });
    const title = servers.length > 1 ? [make("h2", { textContent: server.name })] : [];
    this.figure = make("figure", {}, ...title, this.image, this.caption, this.rasters);
  }
  show(event) {
    this.image.src = `data:image/${event.output_format};base64,${event.b64_json}`;
    this.image.alt = `picture of seed ${this.seed}, being drawn`;
    if (event.kept) {
      this.caption.textContent = `seed ${this.seed}: ${event.kept.drawn} of ${event.kept.lines * event.kept.columns} tokens`;
      this.rasters.replaceChildren(...event.kept.types.map((type) => raster(type, event.kept)));
    } else {
      this.caption.textContent = `seed ${this.seed}: drawing`;
    }
  }
  done(event, seconds) {
    const usage = event.usage, cache = usage?.kv_cache;
    const facts = [`seed ${this.seed}`, `${seconds.toFixed(1)} s`];
    if (usage?.steps) facts.push(`${usage.steps} steps for ${usage.output_tokens} tokens`);
    if (cache) {
      const share = Math.round(100 * cache.resident_bytes / cache.full_bytes); // a full cache's whole blocks: over 100
      const beside = share < 100 ? `, ${share}% of the full cache's ${bytes(cache.full_bytes)}` : "";
      facts.push(`KV cache ${bytes(cache.resident_bytes)}${beside}`);
    }
    const link = make("a", { href: this.image.src, download: `seed-${this.seed}.${event.output_format}`, textContent: "download" });
    this.image.alt = `picture of seed ${this.seed}`;
    this.caption.replaceChildren(`${facts.join(", ")} – `, link);
    for (const note of event.notes ?? []) this.caption.append(make("div", { textContent: note }));
  }
}

// One head type: a cell a token, the brighter the more heads hold it; grey has not been drawn.
function raster(type, kept) {
  const canvas = make("canvas", { width: kept.columns, height: kept.lines });
  const held = type.percent.slice(0, kept.drawn), mean = held.reduce((a, b) => a + b, 0) / 100;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${type.name}, ${type.heads} heads: ${mean.toFixed(0)} of ${kept.drawn} tokens kept`);
  const context = canvas.getContext("2d");
  for (let token = 0; token < kept.lines * kept.columns; token++) {
    const share = type.percent[token] / 100;
    context.fillStyle = token < kept.drawn ? `hsl(212 75% ${6 + 62 * share}%)` : "#8885";
    context.fillRect(token % kept.columns, Math.floor(token / kept.columns), 1, 1);
  }
  return make("div", {}, canvas, `${type.name}, ${type.heads} heads: ${mean.toFixed(0)} of ${kept.drawn} kept`);
}

async function alive(server) {
  // Of another server's answer a page may know that there was one.
  const mode = server.url ? "no-cors" : "same-origin";
  return fetch(`${server.url}health`, { mode }).then((answer) => answer.ok || answer.type === "opaque", () => false);
}

// After a restart: say when the server is back.
async function waitFor(server) {
  const name = servers.length > 1 ? server.name : "The server";
  for (;;) {
    await new Promise((wake) => setTimeout(wake, 1000));
    if (running) return;
    if (await alive(server)) break;
  }
  $("error").textContent = "";
  $("status").textContent = `${name} is back.`;
}

function remember(asked, b64) {
  const image = new Image();
  image.onload = () => {
    const scale = 96 / Math.max(image.width, image.height);
    const canvas = make("canvas", { width: scale * image.width, height: scale * image.height });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    const entry = { ...asked, thumb: canvas.toDataURL("image/jpeg", 0.8) };
    keep(localStorage, HISTORY, [entry, ...stored(localStorage, HISTORY, [])].slice(0, MOST));
    listHistory();
  };
  image.src = `data:image/png;base64,${b64}`;
}

function listHistory() {
  const entries = stored(localStorage, HISTORY, []);
  $("forget").hidden = !entries.length;
  $("history").replaceChildren(...entries.map((entry) => {
    const again = make("button", { type: "button", textContent: "Draw again" });
    again.setAttribute("aria-label", `Draw again: ${entry.prompt}, seed ${entry.seed}`);
    again.addEventListener("click", () => {
      if (running) return;
      fill(entry); draw(); scrollTo({ top: 0 });
      $("draw").focus(); // this list is made anew when the picture is done
    });
    const more = Number(entry.n) > 1 ? `, ${entry.n} pictures` : "";
    return make("li", {}, make("img", { src: entry.thumb, alt: "" }),
      make("span", {}, entry.prompt, make("div", { className: "soft", textContent: `seed ${entry.seed}${more}` })), again);
  }));
}
$("forget").addEventListener("click", () => { localStorage.removeItem(HISTORY); listHistory(); $("prompt").focus(); });
listHistory();
