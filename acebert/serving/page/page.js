"use strict";
// The address holds what is shown (?q= or ?like=), so that back, forward and links work. With
// ?compare=1 two arms of the experiment that runs stand side by side, to be voted on.
const $ = (id) => document.getElementById(id);
const PATHS = { hot: "hot query", tail: "encoded now", product: "similar items" };
let running = null;
let typed = 0;

async function ask(address, signal, body) {
  const key = sessionStorage.getItem("key");
  const headers = key ? { "X-API-Key": key } : {};
  if (comparing()) headers["X-User-Id"] = reviewer();
  if (body) headers["Content-Type"] = "application/json";
  const sent = body ? { method: "POST", body: JSON.stringify(body) } : {};
  const answer = await fetch(address, { signal, headers, ...sent });
  if (answer.status === 401) {
    if (sessionStorage.getItem("key") !== key) return ask(address, signal, body); // given meanwhile
    const given = window.prompt("API key");
    if (given === null) throw new Error("This service needs an API key.");
    sessionStorage.setItem("key", given);
    return ask(address, signal, body);
  }
  const failed = `The service answered ${answer.status}: try again.`; // or what stands before it did
  const told = await answer.json().catch(() => ({ error: failed }));
  if (!answer.ok) throw new Error(told.error);
  return told;
}

function comparing() {
  return state().has("compare");
}

function reviewer() { // the same for all votes of this browser
  if (!localStorage.getItem("reviewer")) {
    const drawn = crypto.getRandomValues(new Uint32Array(4));
    localStorage.setItem("reviewer", "reviewer-" + [...drawn].join("-"));
  }
  return localStorage.getItem("reviewer");
}

function state() {
  return new URLSearchParams(location.search);
}

function go(values, replace) {
  const wanted = new URLSearchParams(comparing() ? { compare: "1" } : {});
  for (const [name, value] of Object.entries(values)) if (value) wanted.set(name, value);
  const address = wanted.size ? "?" + wanted : location.pathname;
  history[replace ? "replaceState" : "pushState"](null, "", address);
  show();
}

async function show() {
  const now = state();
  const like = now.get("like");
  const q = (now.get("q") || "").trim();
  if (like || $("query").value.trim() !== q) $("query").value = q; // not while a space is typed
  $("category").value = now.get("category") || "";
  for (const id of ["hybrid", "clicks"]) $(id).checked = now.has(id);
  if (running) running.abort();
  $("hits").hidden = comparing();
  for (const id of ["hybrid", "clicks"]) $(id).parentNode.hidden = comparing();
  if (!q && !like) {
    $("hits").replaceChildren();
    $("sides").hidden = true;
    $("status").textContent = "";
    $("empty").hidden = false;
    return;
  }
  running = new AbortController();
  if (comparing()) return compare(q, now.get("category"), running.signal);
  const asked = new URLSearchParams({ k: 40 });
  if (now.get("category")) asked.set("category", now.get("category"));
  if (!like) asked.set("q", q);
  for (const id of ["hybrid", "clicks"]) if (!like && now.has(id)) asked.set(id, "true");
  const address = (like ? "/similar/" + encodeURIComponent(like) : "/search") + "?" + asked;
  const start = performance.now();
  try {
    const answer = await ask(address, running.signal);
    draw(answer, like, performance.now() - start);
  } catch (error) {
    if (error.name !== "AbortError") $("status").textContent = error.message;
  }
}

async function compare(q, category, signal) {
  const asked = new URLSearchParams({ q, k: 12 });
  if (category) asked.set("category", category);
  try {
    const answer = await ask("/compare?" + asked, signal);
    $("empty").hidden = true;
    $("sides").hidden = false;
    for (const side of ["left", "right"]) $(side).replaceChildren(...answer[side].map(card));
    for (const shown of $("sides").querySelectorAll(".card")) shown.disabled = true;
    for (const button of votes()) {
      button.disabled = false;
      button.onclick = () => vote(answer.search_id, button.dataset.better);
    }
    $("status").textContent = "Which list is better?";
  } catch (error) {
    if (error.name !== "AbortError") $("status").textContent = error.message;
  }
}

function votes() {
  return $("verdict").querySelectorAll("button");
}

async function vote(search_id, better) {
  for (const button of votes()) button.disabled = true;
  try {
    await ask("/votes", undefined, { search_id, better });
    $("status").textContent = "Thank you: your vote is kept. Search again for the next one.";
  } catch (error) {
    for (const button of votes()) button.disabled = false;
    $("status").textContent = error.message;
  }
}

function draw(answer, like, elapsed) {
  $("empty").hidden = true;
  $("hits").replaceChildren(...answer.hits.map(card));
  const verdict = answer.no_good_match ? "no good match · " : "";
  const told = document.createElement("b");
  told.textContent = like ? `Similar to ${like}` : `${answer.hits.length} products`;
  $("status").replaceChildren(told, ` · ${verdict}${PATHS[answer.path]} · ` +
    `${answer.took_ms.toFixed(1)} ms in the service, ${elapsed.toFixed(0)} ms here`);
}

function card(hit) {
  const made = $("card").content.cloneNode(true);
  const button = made.querySelector(".card");
  const image = made.querySelector("img");
  image.src = hit.photo;
  image.addEventListener("error", () => { image.parentNode.textContent = "no photo"; });
  made.querySelector(".title").textContent = hit.title || hit.product_id;
  made.querySelector(".price").textContent = hit.price === null ? "" : hit.price.toFixed(2);
  made.querySelector(".stock").textContent = hit.in_stock ? "" : "out of stock";
  made.querySelector(".category").textContent = hit.category || "";
  made.querySelector(".score").textContent = "score" in hit ? hit.score.toFixed(3) : "";
  button.setAttribute("aria-label", `${hit.title || hit.product_id}: show similar items`);
  button.addEventListener("click", () => {
    window.scrollTo(0, 0);
    go({ like: hit.product_id });
  });
  return made;
}

function typing(replace) {
  go({ q: $("query").value, category: $("category").value, hybrid: $("hybrid").checked && "1",
    clicks: $("clicks").checked && "1" }, replace);
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); typing(false); });
$("query").addEventListener("input", () => {
  clearTimeout(typed);
  typed = setTimeout(() => typing(true), 150);
});
$("category").addEventListener("change", () => {
  const like = state().get("like");
  if (like) go({ like, category: $("category").value }); else typing(false);
});
for (const id of ["hybrid", "clicks"]) $(id).addEventListener("change", () => typing(false));
window.addEventListener("popstate", show);
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== $("query")) {
    event.preventDefault();
    $("query").focus();
    $("query").select();
    return;
  }
  const cards = [...document.querySelectorAll(".card")];
  const at = cards.indexOf(document.activeElement);
  const columns = getComputedStyle($("hits")).gridTemplateColumns.split(" ").length;
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
  if (!(event.key in steps) || !cards.length) return;
  if (at < 0 && !(event.key === "ArrowDown" && document.activeElement === $("query"))) return;
  event.preventDefault();
  const next = at < 0 ? 0 : at + steps[event.key];
  if (next < 0) $("query").focus();
  else if (next < cards.length) cards[next].focus();
});

show(); // at once: what is typed before the categories come would be overwritten
ask("/categories").then(({ categories }) => {
  for (const name of categories) $("category").add(new Option(name, name));
  $("category").value = state().get("category") || "";
}, (error) => { $("status").textContent = error.message; });
