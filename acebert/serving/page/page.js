"use strict";
// The address holds what is shown (?q= or ?like=), so that back, forward and links work.
const $ = (id) => document.getElementById(id);
const PATHS = { hot: "hot query", tail: "encoded now", product: "similar items" };
let running = null;
let typed = 0;

async function ask(address, signal) {
  const key = sessionStorage.getItem("key");
  const answer = await fetch(address, { signal, headers: key ? { "X-API-Key": key } : {} });
  if (answer.status === 401) {
    const given = window.prompt("API key");
    if (given === null) throw new Error("This service needs an API key.");
    sessionStorage.setItem("key", given);
    return ask(address, signal);
  }
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

function state() {
  return new URLSearchParams(location.search);
}

function go(values, replace) {
  const wanted = new URLSearchParams();
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
  $("hybrid").checked = now.has("hybrid");
  if (running) running.abort();
  if (!q && !like) {
    $("hits").replaceChildren();
    $("status").textContent = "";
    $("empty").hidden = false;
    return;
  }
  running = new AbortController();
  const asked = new URLSearchParams({ k: 40 });
  if (now.get("category")) asked.set("category", now.get("category"));
  if (!like) asked.set("q", q);
  if (!like && now.has("hybrid")) asked.set("hybrid", "true");
  const address = (like ? "/similar/" + encodeURIComponent(like) : "/search") + "?" + asked;
  const start = performance.now();
  try {
    const answer = await ask(address, running.signal);
    draw(answer, like, performance.now() - start);
  } catch (error) {
    if (error.name !== "AbortError") $("status").textContent = error.message;
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
  made.querySelector(".score").textContent = hit.score.toFixed(3);
  button.setAttribute("aria-label", `${hit.title || hit.product_id}: show similar items`);
  button.addEventListener("click", () => {
    window.scrollTo(0, 0);
    go({ like: hit.product_id });
  });
  return made;
}

function typing(replace) {
  go({ q: $("query").value, category: $("category").value, hybrid: $("hybrid").checked && "1" },
    replace);
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
$("hybrid").addEventListener("change", () => typing(false));
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
