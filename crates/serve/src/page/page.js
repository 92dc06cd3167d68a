// The page at "/": a document on the left, questions and answers on the right. No libraries.
"use strict";

const $ = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en-US");

/** What is asked about: its text, and what the server calls it under each policy. */
let source = null; // { name, body: Blob | null, text, sessions: Map(context -> Promise(info)), ids }
let running = null; // AbortController
let marks = []; // of the answer that is shown

// Key and theme.

function storage(name, value) {
  try {
    if (value === undefined) return sessionStorage.getItem(name);
    sessionStorage.setItem(name, value);
  } catch {
    // Private windows may refuse; then nothing is remembered.
  }
  return null;
}

function headers(more) {
  const key = $("key").value.trim();
  return key ? { ...more, Authorization: `Bearer ${key}` } : { ...more };
}

function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function nameTheme() {
  $("theme").textContent = dark() ? "Light" : "Dark";
}

$("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  storage("theme", document.documentElement.dataset.theme);
  nameTheme();
});

$("key").addEventListener("change", () => {
  storage("key", $("key").value);
  connect();
});

// Talking with the server.

/** The error of an answer, as a sentence. */
async function failure(response) {
  if (response.status === 401) document.querySelector(".key").hidden = false;
  try {
    return new Error((await response.json()).error.message);
  } catch {
    return new Error(`The server answered ${response.status}.`);
  }
}

/** Reads server-sent events and hands over each as an object. */
async function events(response, take) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    text += decoder.decode(value, { stream: !done });
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const block = text.slice(0, end);
      text = text.slice(end + 2);
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (!data) continue;
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      take(event);
    }
    if (done) throw new Error("The server broke off.");
  }
}

async function connect() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) throw await failure(response);
    const model = (await response.json()).data[0];
    $("model").textContent = `${model.id}, window of ${number(model.context_window)} tokens`;
    tell("");
  } catch (error) {
    $("model").textContent = "not connected";
    tell(error.message);
  }
}

function tell(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

// The document.

function open(name, body, text) {
  const old = source;
  source = { name, body, text, sessions: new Map(), ids: [] };
  if (old) release(old);
  $("drop").hidden = true;
  $("pasting").hidden = true;
  $("hint").hidden = true;
  show([]);
  $("text").hidden = false;
  $("text").textContent = text ?? "The text appears once the document is read.";
  $("document-info").textContent = name;
}

/** Lets the server forget a document, also while the page closes. */
function release(old) {
  for (const id of old.ids) {
    fetch(`/v1/documents/${id}`, { method: "DELETE", headers: headers(), keepalive: true }).catch(() => {});
  }
}

addEventListener("pagehide", () => {
  if (source) release(source);
});

async function take(file) {
  tell("");
  const plain = file.type.startsWith("text/") && file.type !== "text/html";
  const known = plain || /\.(txt|md|csv|json|rs|py|js|c|h|toml|log)$/i.test(file.name);
  open(file.name, file, known ? await file.text() : null);
}

/** The document under a policy: read now, or before. */
function session(context, progress, signal) {
  let known = source.sessions.get(context);
  if (!known) {
    const mine = source;
    known = upload(mine, context, progress, signal);
    mine.sessions.set(context, known);
    known.catch(() => mine.sessions.delete(context));
  }
  return known;
}

async function upload(mine, context, progress, signal) {
  const query = new URLSearchParams({ name: mine.name, context, stream: "true" });
  const body = mine.body ?? new Blob([mine.text], { type: "text/plain" });
  const response = await fetch(`/v1/documents?${query}`, {
    method: "POST",
    headers: headers({ "Content-Type": "application/octet-stream" }),
    body,
    signal,
  });
  if (!response.ok) throw await failure(response);
  let info = null;
  await events(response, (event) => {
    if (event.progress) progress(event.progress);
    if (event.document) info = event.document;
    if (event.document) mine.ids.push(info.id);
  });
  // What the server read is what its character ranges count in.
  const whole = await fetch(`/v1/documents/${info.id}?text=true`, { headers: headers(), signal });
  if (!whole.ok) throw await failure(whole);
  const text = (await whole.json()).text;
  if (text !== null && text !== mine.text && mine === source) {
    mine.text = text;
    show(marks);
  }
  if (mine === source) {
    $("document-info").textContent = `${mine.name}, ${number(info.tokens)} tokens`;
  }
  return info;
}

/** Draws where an answer looked: over the text, and as a map of the whole. */
function show(looked, what) {
  marks = looked;
  const text = source?.text ?? "";
  const known = looked.filter((look) => look.chars && text);
  $("map").hidden = known.length === 0;
  $("legend").hidden = known.length === 0;
  $("legend-what").textContent = what ?? "";
  const box = $("text");
  if (!text) return;
  if (known.length === 0) {
    box.textContent = text;
    return;
  }
  // Offsets count characters; JavaScript's strings count UTF-16 units.
  const letters = Array.from(text);
  // The ends of a text draw attention whatever they say; they must not outshine the rest.
  const inner = known.filter((look) => look.chars[0] > 0 && look.chars[1] < letters.length);
  const weights = (inner.length ? inner : known).map((look) => look.weight).sort((a, b) => a - b);
  const many = weights.length > 8;
  const low = weights[Math.floor(weights.length * 0.75)] ?? 0;
  const high = weights[weights.length - 1] || 1;
  const heat = (weight) => {
    if (many && weight < low) return 0;
    const floor = many ? low : 0;
    return Math.min(1, Math.max(0.12, (weight - floor) / (high - floor || 1)));
  };
  const fragment = document.createDocumentFragment();
  let at = 0;
  let best = null;
  for (const look of known) {
    const [from, to] = look.chars;
    if (from < at || to <= from) continue;
    const strength = heat(look.weight);
    if (strength === 0) continue;
    fragment.append(letters.slice(at, from).join(""));
    const mark = document.createElement("mark");
    mark.textContent = letters.slice(from, to).join("");
    mark.style.setProperty("--strength", strength.toFixed(3));
    mark.title = `${(100 * look.weight).toFixed(1)} % of its looks`;
    if (inner.includes(look) && (!best || look.weight > best.weight)) best = { weight: look.weight, mark };
    fragment.append(mark);
    at = to;
  }
  fragment.append(letters.slice(at).join(""));
  box.replaceChildren(fragment);
  draw(known, letters.length, heat);
  if (best) box.scrollTop = best.mark.offsetTop - box.offsetTop - box.clientHeight / 3;
}

function draw(known, length, heat) {
  const parts = 160;
  const cells = new Array(parts).fill(0);
  for (const look of known) {
    const first = Math.floor((look.chars[0] / length) * parts);
    const last = Math.min(parts - 1, Math.floor(((look.chars[1] - 1) / length) * parts));
    for (let cell = first; cell <= last; cell++) cells[cell] = Math.max(cells[cell], heat(look.weight));
  }
  $("map").replaceChildren(
    ...cells.map((strength, index) => {
      const cell = document.createElement("span");
      cell.classList.toggle("hot", strength > 0);
      cell.style.setProperty("--strength", strength.toFixed(3));
      cell.dataset.at = index / parts;
      return cell;
    }),
  );
}

$("map").addEventListener("click", (event) => {
  const box = $("text");
  if (event.target.dataset.at) box.scrollTop = event.target.dataset.at * box.scrollHeight - box.clientHeight / 3;
});

// Opening documents.

const pick = () => $("file").click();
$("choose").addEventListener("click", pick);
$("drop").addEventListener("click", pick);
$("drop").addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    pick();
  }
});
$("file").addEventListener("change", () => {
  if ($("file").files[0]) take($("file").files[0]);
  $("file").value = "";
});
$("paste").addEventListener("click", () => {
  for (const id of ["drop", "text", "map", "legend"]) $(id).hidden = true;
  $("pasting").hidden = false;
  $("pasted").focus();
});
$("paste-cancel").addEventListener("click", () => {
  $("pasting").hidden = true;
  $("drop").hidden = source !== null;
  $("text").hidden = source === null;
  if (source) show(marks);
});
$("paste-done").addEventListener("click", () => {
  const text = $("pasted").value;
  if (!text.trim()) return tell("There is no text yet.");
  tell("");
  open("pasted text", null, text);
  $("question").focus();
});
for (const name of ["dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    $("reader").classList.toggle("over", name === "dragover");
    const file = name === "drop" && event.dataTransfer.files[0];
    if (file) take(file);
  });
}

// Asking.

$("compare").addEventListener("change", () => {
  const two = $("compare").checked;
  document.querySelector('fieldset[data-side="1"]').hidden = !two;
  document.querySelector('fieldset[data-side="0"] legend').textContent = two ? "First method" : "Method";
  $("methods").classList.toggle("two", two);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question) {
    tell("Write a question first.");
    $("question").focus();
    return;
  }
  tell("");
  running?.abort();
  const mine = new AbortController();
  running = mine;
  $("stop").disabled = false;
  $("ask").disabled = true;
  const two = $("compare").checked;
  const methods = [...document.querySelectorAll("fieldset[data-side]")].slice(0, two ? 2 : 1).map((side) => ({
    context: side.querySelector('[name="context"]').value.trim() || "auto",
    decode: side.querySelector('[name="decode"]').value.trim() || "greedy",
  }));
  $("answers").classList.toggle("two", two);
  $("answers").replaceChildren();
  const cards = methods.map((method) => {
    const card = $("answer-template").content.cloneNode(true).firstElementChild;
    // Names first; a long row of options is for those who look for it.
    const [names, options] = [0, 1].map((part) => [method.context, method.decode].map((spec) => spec.split(/:(.*)/s)[part]));
    card.querySelector("h3").textContent = names.join(" · ");
    card.querySelector(".options").textContent = options.filter(Boolean).join(" · ").replaceAll(",", ", ");
    $("answers").append(card);
    return card;
  });
  const all = methods.map((method, index) => answer(method, question, cards[index], mine.signal, index === 0));
  await Promise.all(all);
  if (running === mine) {
    running = null;
    $("stop").disabled = true;
    $("ask").disabled = false;
  }
});

function advance(card, progress, word) {
  const share = progress.total ? Math.round((100 * progress.read) / progress.total) : 0;
  const bar = card.querySelector(".progress");
  bar.setAttribute("aria-valuenow", share);
  bar.setAttribute("aria-label", word);
  bar.firstElementChild.style.width = `${share}%`;
  card.querySelector(".state").textContent = `${word}: ${number(progress.read)} of ${number(progress.total)} tokens`;
}

async function answer(method, question, card, signal, first) {
  const state = card.querySelector(".state");
  const said = card.querySelector(".said");
  state.textContent = "waiting";
  try {
    const body = {
      messages: [{ role: "user", content: question }],
      stream: true,
      stream_options: { include_usage: true, include_progress: true },
      max_tokens: Number($("max").value) || 256,
      decode: method.decode,
      show_context: true,
    };
    if (source) {
      const info = await session(method.context, (progress) => advance(card, progress, "reading the document"), signal);
      body.session = info.id;
    } else if (method.context !== "auto") {
      body.context = method.context;
    }
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers({ "Content-Type": "application/json" }),
      body: JSON.stringify(body),
      signal,
    });
    if (!response.ok) throw await failure(response);
    let last = null;
    await events(response, (event) => {
      if (event.progress) advance(card, event.progress, "reading the question");
      const choice = event.choices[0];
      if (choice?.delta.content) {
        said.append(choice.delta.content);
        state.textContent = "writing";
      }
      if (event.longspan) last = event;
    });
    finish(card, last, first);
  } catch (error) {
    if (signal.aborted) {
      state.textContent = "stopped";
    } else {
      state.textContent = "failed";
      card.classList.add("failed");
      card.querySelector(".progress").hidden = true;
      said.textContent = error.message;
    }
  }
}

function finish(card, last, first) {
  card.querySelector(".progress").hidden = true;
  const state = card.querySelector(".state");
  state.hidden = true;
  if (!last) return;
  const { usage, longspan } = last;
  const speed = usage.completion_tokens / (longspan.decode_seconds || 1e-9);
  const figures = [
    ["context", longspan.context.split(":")[0]],
    ["read before", number(usage.prompt_tokens_details?.cached_tokens ?? 0)],
    ["read now", number(usage.prompt_tokens - (usage.prompt_tokens_details?.cached_tokens ?? 0))],
    ["wrote", `${number(usage.completion_tokens)} tokens`],
    ["speed", `${speed.toFixed(1)} tokens/s`],
    ["passes", number(longspan.forwards)],
  ];
  card.querySelector(".figures").replaceChildren(
    ...figures.map(([name, value]) => {
      const row = document.createElement("div");
      const term = document.createElement("dt");
      const text = document.createElement("dd");
      term.textContent = name;
      text.textContent = value;
      row.append(term, text);
      return row;
    }),
  );
  const looked = (longspan.looked ?? []).filter((look) => look.chars);
  const button = card.querySelector(".show");
  if (!source || looked.length === 0) return;
  const what = longspan.context.startsWith("infllm") ? "Blocks that the model picked while it answered." : "Attention received while the model answered.";
  const reveal = () => {
    document.querySelectorAll(".answer.shown").forEach((other) => other.classList.remove("shown"));
    card.classList.add("shown");
    show(looked, what);
  };
  button.hidden = false;
  button.addEventListener("click", reveal);
  if (first) reveal();
}

const theme = storage("theme");
if (theme) document.documentElement.dataset.theme = theme;
$("key").value = storage("key") ?? "";
nameTheme();
connect();
