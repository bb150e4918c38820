"use strict";

const main = document.getElementById("main");
const dialog = document.getElementById("image");
const TILE = 148;    // pixels of a tile with its gap
const PAGE = 100;    // images of one request
const KEPT = 30;     // pages of a grid that stay in memory
const MOST = 500;    // images of one request where all are wanted
let run = {};
let leaving = new AbortController(); // ends what a page asks for when another is opened

const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const named = (name, number) => name || `Cluster ${number}`;
const title = (c) => named(c.name, c.number);
const percent = (share) => `${Math.floor(100 * share)}%`;
const sure = (c) => `${percent(c.confidence)} sure`;
const purity = (c) => `${percent(c.purity)} ${/^\d+$/.test(c.label) ? `class ${c.label}` : c.label}`;
const lastPart = (uri) => uri.replace(/\/+$/, "").split("/").pop() || uri;
const picture = (row, size) => `/api/images/${row}/picture?size=${size}`;
const copy = (id) => document.getElementById(id).content.firstElementChild.cloneNode(true);

function say(text, isError) {
  const status = document.getElementById("status");
  status.textContent = text;
  status.classList.toggle("error", Boolean(isError));
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// An image; where the run has none, its key.
const shot = (row, key, size) => run.has_pictures
  ? make("img", { src: picture(row, size), alt: key, loading: "lazy" })
  : make("span", { className: "bare", textContent: lastPart(key || `row ${row.toLocaleString("en")}`) });

async function ask(path, options) {
  const answer = await fetch(path, { ...options, headers: { "x-rayclust": "1" } });
  if (!answer.ok) {
    const text = await answer.text();
    let message = text;
    try { message = JSON.parse(text).error; } catch { /* plain text */ }
    say(message, true);
    throw new Error(message);
  }
  return answer;
}

const get = async (path, values) =>
  (await ask(`${path}?${new URLSearchParams(values || {})}`, { signal: leaving.signal })).json();
const post = (path, body) => ask(path, { method: "POST", body: JSON.stringify(body) });

async function edit(change, said) {
  show(await (await post("/api/edits", change)).json());
  say(said);
}

async function saveTable(wanted, name) {
  const data = await (await post("/api/table.csv", wanted)).blob();
  const link = make("a", { href: URL.createObjectURL(data), download: `${name}.csv` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  say(`${name}.csv is saved`);
}

// What is said of the whole run.
function show(facts) {
  run = facts;
  const name = lastPart(facts.run);
  document.title = `${name} · rayclust`;
  document.querySelector("h1 a").textContent = name;
  const source = facts.encoder === "unknown" ? "ready embeddings" : facts.encoder;
  document.getElementById("about").textContent =
    `${count(facts.images, "image")} in ${count(facts.clusters, "cluster")}, by the method ${facts.method} from ${source}`;
  document.getElementById("undo").hidden = !facts.edits;
  document.getElementById("against").hidden = !facts.against;
  document.getElementById("mapped").hidden = !facts.is_mapped;
  document.getElementById("words").disabled = !facts.reads_text;
  document.getElementById("words").placeholder =
    facts.reads_text ? "Search images by words" : "This encoder reads no words";
  document.getElementById("search").hidden = facts.encoder === "unknown"; // nothing could read words or an image
  const unfit = document.getElementById("unfit");
  unfit.hidden = !facts.unfit.length;
  unfit.querySelector("summary").textContent = `${count(facts.unfit.length, "edit")} no longer fit these clusters`;
  unfit.querySelector("ul").replaceChildren(...facts.unfit.map((each) => make("li", { textContent: `${each.edit.do}: ${each.reason}` })));
}

// The list of all clusters.
const view = { query: "", sort: "size", descending: true, selected: new Map() };

async function openList() {
  const section = copy("list");
  const part = (name) => section.querySelector(`[name=${name}]`);
  const cards = section.querySelector(".cards");
  let shown = 0, asked = 0;

  function select() {
    const selection = section.querySelector("[data-selection]");
    selection.hidden = !view.selected.size;
    section.querySelector("[data-selected]").textContent = `${view.selected.size} selected`;
    part("merge").disabled = view.selected.size < 2;
  }

  async function load(more) {
    const turn = ++asked;
    const found = await get("/api/clusters", {
      query: view.query, sort: view.sort, descending: view.descending ? 1 : 0, offset: more ? shown : 0, limit: PAGE,
    });
    if (turn !== asked) return;
    if (!more) { cards.replaceChildren(); shown = 0; }
    cards.append(...found.clusters.map(card));
    shown += found.clusters.length;
    part("more").hidden = shown >= found.total;
    section.querySelector("[data-count]").textContent =
      `${count(found.total, "cluster")}, ${count(found.images, "image")}`;
  }

  function card(cluster) {
    const element = copy("card");
    const link = element.querySelector("a");
    link.href = `#/cluster/${cluster.number}`;
    element.querySelector("b").textContent = title(cluster);
    element.querySelector(".pictures").append(...cluster.typical.map((row) => shot(row, "", 160)));
    const facts = [`#${cluster.number}`, count(cluster.size, "image"), sure(cluster)];
    if (cluster.label !== null) facts.push(purity(cluster));
    if (cluster.mark) facts.push(`marked ${cluster.mark}`);
    element.querySelector("p").textContent = facts.join(" · ");
    const box = element.querySelector("input");
    box.checked = view.selected.has(cluster.number);
    box.setAttribute("aria-label", `select ${title(cluster)}`);
    box.onchange = () => {
      if (box.checked) view.selected.set(cluster.number, title(cluster)); else view.selected.delete(cluster.number);
      select();
    };
    return element;
  }

  part("query").value = view.query;
  part("sort").value = view.sort;
  part("query").oninput = () => { view.query = part("query").value; load(); };
  part("sort").onchange = () => { view.sort = part("sort").value; load(); };
  part("descending").onclick = () => {
    view.descending = !view.descending;
    part("descending").setAttribute("aria-pressed", view.descending);
    load();
  };
  part("descending").setAttribute("aria-pressed", view.descending);
  part("more").onclick = () => load(true);
  part("clear").onclick = () => { view.selected.clear(); openList(); };
  part("csv").onclick = () => saveTable({ clusters: [...view.selected.keys()] }, "clusters");
  part("merge").onclick = async () => {
    const clusters = [...view.selected.keys()], names = [...view.selected.values()];
    await edit({ do: "merge", clusters }, `Merged ${names.join(", ")}`);
    view.selected.clear();
    location.hash = `#/cluster/${clusters[0]}`;
  };
  main.replaceChildren(section);
  select();
  await load();
}

// A grid of any number of images, of which only what is on the screen is in the page.
function grid(element, total, pageOf, selected, onSelect) {
  const pages = new Map(), tiles = new Map();
  let columns = 1;

  function page(number) {
    if (!pages.has(number)) {
      pages.set(number, pageOf(number * PAGE, PAGE));
      if (pages.size > KEPT) pages.delete(pages.keys().next().value);
    }
    return pages.get(number);
  }

  function draw() {
    if (!element.isConnected) { removeEventListener("scroll", draw); removeEventListener("resize", draw); return; }
    columns = Math.max(1, Math.floor(element.clientWidth / TILE));
    element.style.height = `${Math.ceil(total / columns) * TILE}px`;
    const top = Math.max(0, -element.getBoundingClientRect().top);
    const first = Math.max(0, Math.floor(top / TILE) - 1) * columns;
    const last = Math.min(total, (Math.ceil((top + innerHeight) / TILE) + 1) * columns);
    for (const [place, tile] of tiles) if (place < first || place >= last) { tile.remove(); tiles.delete(place); }
    for (let place = first; place < last; place++) {
      if (!tiles.has(place)) fill(place);
      const style = tiles.get(place).style;
      style.left = `${(place % columns) * TILE}px`;
      style.top = `${Math.floor(place / columns) * TILE}px`;
    }
  }

  async function fill(place) {
    const tile = make("div", { className: "tile", role: "listitem" });
    tiles.set(place, tile);
    element.append(tile);
    const image = (await page(Math.floor(place / PAGE)))[place % PAGE];
    if (!image || !tile.isConnected) return;
    const open = make("button", { type: "button" }, shot(image.row, image.key, 160));
    open.title = `${image.key}, ${sure(image)}`;
    open.onclick = () => openImage(image.row);
    tile.append(open);
    if (selected) {
      const box = make("input", { type: "checkbox", checked: selected.has(image.row) });
      box.setAttribute("aria-label", `select ${image.key}`);
      box.onchange = () => { if (box.checked) selected.add(image.row); else selected.delete(image.row); onSelect(); };
      tile.append(box);
    }
  }

  addEventListener("scroll", draw, { passive: true });
  addEventListener("resize", draw);
  draw();
}

async function openCluster(number) {
  const cluster = await get(`/api/clusters/${number}`);
  const section = copy("cluster");
  const part = (name) => section.querySelector(`[name=${name}]`);
  const selected = new Set();
  let odd = false;

  function head(found) {
    section.querySelector("h2").textContent = title(found);
    part("name").value = found.name || "";
    part("mark").value = found.mark || "";
    const facts = [`#${found.number}`, count(found.size, "image"), sure(found)];
    if (found.label !== null) facts.push(purity(found));
    if (found.runners_up.length) facts.push(`next best names: ${found.runners_up.join(", ")}`);
    section.querySelector("[data-facts]").textContent = facts.join(" · ");
  }

  async function images() {
    const values = { odd_first: odd ? 1 : 0 };
    const pageOf = async (offset, limit) =>
      (await get(`/api/clusters/${number}/images`, { ...values, offset, limit })).images;
    const fresh = make("div", { className: "grid" });
    fresh.setAttribute("role", "list");
    section.querySelector(".grid").replaceWith(fresh);
    grid(fresh, cluster.size, pageOf, selected, select);
  }

  function select() {
    section.querySelector("[data-selection]").hidden = !selected.size;
    section.querySelector("[data-selected]").textContent = `${selected.size} selected`;
  }

  section.querySelector("form").onsubmit = async (event) => {
    event.preventDefault();
    const name = part("name").value.trim();
    if (!name) return;
    await edit({ do: "rename", cluster: number, name }, `Renamed to ${name}`);
    head(await get(`/api/clusters/${number}`));
  };
  part("set-mark").onclick = async () => {
    const mark = part("mark").value.trim() || null;
    await edit({ do: "mark", cluster: number, mark }, mark ? `Marked ${mark}` : "Mark removed");
  };
  part("csv").onclick = () => saveTable({ clusters: [number] }, `cluster-${number}`);
  part("on-map").hidden = !run.is_mapped;
  part("on-map").onclick = () => { location.hash = `#/map/${number}`; };
  part("csv-rows").onclick = () => saveTable({ rows: [...selected] }, "images");
  part("save").onclick = () => saveSelection([...selected]);
  part("clear").onclick = () => { selected.clear(); select(); images(); };
  part("split").onclick = async () => {
    const rows = [...selected];
    await edit({ do: "split", cluster: number, rows }, `Split off ${count(rows.length, "image")}`);
    openCluster(number).catch(() => { location.hash = "#/"; });
  };
  part("odd").onclick = () => {
    odd = !odd;
    part("odd").setAttribute("aria-pressed", odd);
    images();
  };
  head(cluster);
  main.replaceChildren(section);
  await images();
}

// A page of some images, which can be saved; all of them are read for that.
function openImages(heading, total, pageOf) {
  const section = copy("found");
  const rows = async () => {
    const found = [];
    for (let at = 0; at < total; at += MOST) found.push(...(await pageOf(at, MOST)).map((image) => image.row));
    return found;
  };
  section.querySelector("h2").textContent = heading;
  section.querySelector(".tools").hidden = !total;
  section.querySelector("[name=csv-rows]").onclick = async () => saveTable({ rows: await rows() }, "found");
  section.querySelector("[name=save]").onclick = async () => saveSelection(await rows());
  main.replaceChildren(section);
  grid(section.querySelector(".grid"), total, pageOf);
}

const openFound = (heading, found) =>
  openImages(heading, found.length, async (offset, limit) => found.slice(offset, offset + limit));

async function saveSelection(rows) {
  const name = prompt("Save these images as a selection called");
  if (!name) return;
  await post(`/api/selections/${encodeURIComponent(name)}/set`, { rows });
  say(`${count(rows.length, "image")} saved as ${name}`);
}

async function openSelections() {
  const found = Object.entries(await get("/api/selections"));
  const items = found.map(([name, images]) => {
    const link = make("a", { href: `#/selection/${encodeURIComponent(name)}`, textContent: name });
    const remove = make("button", { type: "button", textContent: "Remove" });
    remove.setAttribute("aria-label", `remove ${name}`);
    remove.onclick = async () => { await post(`/api/selections/${encodeURIComponent(name)}/set`, { rows: [] }); openSelections(); };
    return make("li", {}, link, ` ${count(images, "image")} `, remove);
  });
  const none = "None yet: select images of a cluster, or search, and save them under a name.";
  main.replaceChildren(make("section", {}, make("h2", { textContent: "Saved selections" }),
    items.length ? make("ul", {}, ...items) : make("p", { className: "soft", textContent: none })));
}

// Two runs over the same images: which went where.
async function openCompare() {
  say("Comparing …");
  const found = await get("/api/compare");
  say("");
  const section = copy("compare");
  const rows = section.querySelector("tbody"), moved = section.querySelector("[name=moved]");
  const tenths = (share) => `${(100 * share).toFixed(1)}%`;
  section.querySelector("h2").textContent = `Beside the run ${lastPart(found.other)}`;
  section.querySelector("h2").title = found.other;
  section.querySelector("[data-facts]").textContent =
    `Adjusted Rand index ${found.ari} over ${count(found.images, "image")} (1: the same clusters, 0: chance). ` +
    `${tenths(found.together)} of the images went where most of their cluster did.` +
    (found.absent ? ` The other run lacks ${count(found.absent, "image")}.` : "");
  // The drawing's links lead to the images.
  section.querySelector(".flows").append(drawn(found.drawing));
  function draw() {
    const shown = found.flows.filter((flow) => flow.moved || !moved.checked);
    rows.replaceChildren(...shown.map((flow) => {
      const from = make("a", { href: `#/cluster/${flow.from}`, textContent: named(flow.from_name, flow.from) });
      const images = make("a", { href: `#/flow/${flow.from}/${flow.to}`, textContent: flow.images.toLocaleString("en") });
      images.setAttribute("aria-label", `${count(flow.images, "image")} of ${from.textContent} in ${named(flow.to_name, flow.to)}`);
      const bar = (share) => {
        const meter = make("meter", { value: share, max: 1 });
        meter.setAttribute("aria-hidden", "true");
        return make("td", {}, meter, ` ${tenths(share)}`);
      };
      return make("tr", {}, make("td", {}, from), make("td", { textContent: named(flow.to_name, flow.to) }),
        make("td", {}, images), bar(flow.share), bar(flow.share_of_other));
    }));
    if (!shown.length) rows.append(make("tr", {}, make("td", { colSpan: 5, textContent: "No image left its cluster." })));
  }
  moved.onchange = draw;
  draw();
  main.replaceChildren(section);
}

async function openFlow(from, to) {
  const path = `/api/compare/${from}/${to}`;
  const { total, from_name, to_name } = await get(path, { limit: 1 });
  const heading = `${count(total, "image")} in ${named(from_name, from)} here and in ${named(to_name, to)} in the other run`;
  openImages(heading, total, async (offset, limit) => (await get(path, { offset, limit })).images);
}

// A drawing that the server made.
const drawn = (svg) => document.adoptNode(new DOMParser().parseFromString(svg, "image/svg+xml").documentElement);

// How far a run is that still works.
async function openProgress() {
  const section = copy("progress");
  main.replaceChildren(section);
  async function load() {
    const found = await get("/api/progress");
    if (!section.isConnected) return;
    const works = found.driver && !found.driver_ended;
    const health = found.occupied
      ? ` ${found.occupied} of ${found.sized} clusters are occupied, the largest holds ${(100 * found.largest_share).toFixed(1)}%.` : "";
    section.querySelector("[data-facts]").textContent =
      (works ? `At work: ${found.driver}.` : found.next ? `Not up to date, and nobody works on it: ${found.next}` : "Complete.") + health;
    section.querySelector("tbody").replaceChildren(...found.stages.map((stage) => make("tr", {},
      make("td", { textContent: stage.stage }), make("td", { textContent: stage.state }),
      make("td", { textContent: stage.summary }))));
    section.querySelector(".curves").replaceChildren(...Object.entries(found.curves).map(([name, svg]) =>
      make("figure", {}, make("figcaption", { textContent: name }), drawn(svg))));
    // Clusters can be shown once they are labelled.
    if (!run.run && found.stages.some((stage) => stage.stage === "label" && stage.state === "done")) location.reload();
    else if (works) setTimeout(() => load().catch(() => {}), 3000);
  }
  await load();
}

// The map; a lasso takes images.
let picked = [];

async function openMap(number) {
  const found = await get("/api/map");
  const section = copy("plane");
  const part = (name) => section.querySelector(`[name=${name}]`);
  const rows = new Float64Array(bytes(found.row));
  section.querySelector("[data-facts]").textContent = found.count < run.images
    ? `${count(found.count, "image")} of ${run.images.toLocaleString("en")}, drawn by lot.` : "";
  part("csv-rows").onclick = () => saveTable({ rows: picked }, "lasso");
  part("save").onclick = () => saveSelection(picked);
  part("look").onclick = () => { location.hash = "#/lasso"; };
  main.replaceChildren(section);
  const about = async (i) => {
    const [image] = await get("/api/records", { rows: rows[i] });
    return [image.key, run.has_pictures ? make("figure", {}, shot(image.row, "", 160)) : null];
  };
  const showAlone = pointMap({
    N: found.count, K: found.clusters.length, data: async () => found, about, signal: leaving.signal,
    title: (place) => named(found.clusters[place][1], found.clusters[place][0]),
    open: (place) => { location.hash = `#/cluster/${found.clusters[place][0]}`; },
    pick: (points) => { picked = points.map((i) => rows[i]); },
  });
  const place = found.clusters.findIndex((cluster) => cluster[0] === number);
  if (place >= 0) showAlone(place);
}

async function openImage(row) {
  const image = await get(`/api/images/${row}`);
  const facts = make("dl", {});
  const link = make("a", { href: `#/cluster/${image.cluster}`, textContent: named(image.name, image.cluster) });
  link.onclick = () => dialog.close();
  const values = { key: image.key, row: image.row, cluster: link, confidence: percent(image.confidence), class: image.label, original: image.uri };
  for (const [name, value] of Object.entries(values)) {
    if (value !== null) facts.append(make("dt", { textContent: name }), make("dd", {}, value instanceof Node ? value : String(value)));
  }
  const near = make("div", { className: "near" }, ...image.neighbors.map((other) => {
    const button = make("button", { type: "button", title: `${other.key}, cosine ${other.similarity}` },
      shot(other.row, other.key, 160));
    button.onclick = () => openImage(other.row);
    return button;
  }));
  const close = make("button", { type: "button", textContent: "Close", onclick: () => dialog.close() });
  dialog.replaceChildren(make("div", {},
    make("div", { className: "large", hidden: !run.has_pictures }, shot(row, image.key, 1024)),
    make("div", { className: "beside" }, close, facts, make("h2", { textContent: "Nearest images" }), near)));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

async function route() {
  const [, place, value, second] = location.hash.split("/");
  for (const link of document.querySelectorAll("nav a")) {
    link.ariaCurrent = link.hash === `#/${place ?? ""}` ? "page" : null;
  }
  leaving.abort();
  leaving = new AbortController();
  dialog.close();
  scrollTo(0, 0);
  say("");
  if (place === "cluster") await openCluster(Number(value));
  else if (place === "image") { await openList(); await openImage(Number(value)); }
  else if (place === "compare") await openCompare();
  else if (place === "flow") await openFlow(Number(value), Number(second));
  else if (place === "map") await openMap(value === undefined ? null : Number(value));
  else if (place === "lasso") openImages(`${count(picked.length, "image")} in the lasso`, picked.length, async (offset, limit) =>
    get("/api/records", { rows: picked.slice(offset, offset + limit).join() }));
  else if (place === "progress") await openProgress();
  else if (place === "selections") await openSelections();
  else if (place === "selection") openFound(decodeURIComponent(value), await get(`/api/selections/${value}`));
  else if (place === "search") await search(decodeURIComponent(value));
  else await openList();
}

async function search(text) {
  say("Searching …");
  const found = await get("/api/search", { text });
  say("");
  openFound(`Images nearest to “${text}”`, found);
}

document.getElementById("search").onsubmit = (event) => {
  event.preventDefault();
  const text = document.getElementById("words").value.trim();
  if (text) location.hash = `#/search/${encodeURIComponent(text)}`;
};
document.getElementById("upload").onchange = async (event) => {
  const [file] = event.target.files;
  if (!file) return;
  say("Searching …");
  const answer = await ask("/api/search/image", { method: "POST", body: file });
  say("");
  openFound(`Images nearest to ${file.name}`, await answer.json());
  event.target.value = "";
};
document.getElementById("undo").onclick = async () => {
  show(await (await post("/api/edits/undo", {})).json());
  say("The last edit is undone");
  route();
};
addEventListener("hashchange", () => route().catch(() => {}));
addEventListener("unhandledrejection", (event) => { if (event.reason.name === "AbortError") event.preventDefault(); });
ask("/api/run").then((answer) => answer.json()).then(show).then(route).catch((error) => {
  if (run.run) say(error.message, true); else openProgress().then(() => say("")).catch(() => {});
});
