"use strict";
// Search and sort; without this script the page shows the same clusters, largest first.
(() => {
  const tools = document.querySelector(".tools");
  const search = document.getElementById("search");
  const sort = document.getElementById("sort");
  const found = document.getElementById("found");
  const grid = document.getElementById("cards");
  const more = document.getElementById("more");
  const cards = [...grid.children].map((node, place) => ({
    node, place, text: node.dataset.text, name: node.dataset.name,
    size: +node.dataset.size, purity: +(node.dataset.purity ?? NaN), confidence: +(node.dataset.confidence ?? NaN),
  }));
  const body = document.querySelector("#rows tbody");
  const FEW = 500; // a browser lays out so many rows at once without a pause
  let most = FEW;
  let rows = null; // read when first needed: there may be many
  const readRows = () => rows ??= [...body.rows].map((node) => ({ node, text: node.textContent.toLowerCase() }));

  const matches = (text, words) => words.every((word) => text.includes(word));
  const show = (items, words, limit) => {
    let hits = 0;
    for (const item of items) {
      const hit = matches(item.text, words);
      hits += hit;
      const hidden = !hit || hits > limit;
      if (item.node.hidden !== hidden) item.node.hidden = hidden;
    }
    return hits;
  };
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const inCards = show(cards, words, Infinity);
    const inRows = show(readRows(), words, most);
    more.hidden = inRows <= most;
    more.textContent = `Show all ${inRows.toLocaleString("en")} rows`;
    found.textContent = words.length
      ? `${inCards} of ${cards.length} clusters with pictures, ${inRows} of ${rows.length} in the table` : "";
  };
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
  const order = () => {
    const key = sort.value.replace("-", "");
    const sign = sort.value.startsWith("-") ? 1 : -1;
    const compare = key === "name"
      ? (a, b) => collator.compare(a.name, b.name)
      : (a, b) => (isNaN(a[key]) - isNaN(b[key])) || sign * (a[key] - b[key]) || 0;
    grid.append(...[...cards].sort((a, b) => compare(a, b) || a.place - b.place).map((card) => card.node));
  };
  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 80); });
  sort.addEventListener("change", order);
  more.addEventListener("click", () => { most = Infinity; filter(); });
  tools.addEventListener("submit", (event) => { event.preventDefault(); filter(); });
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName ?? "");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) { event.preventDefault(); search.focus(); }
    const open = document.querySelector(".card:target .close");
    if (event.key === "Escape" && open && !typing) open.click();
  });
  tools.hidden = false;
  // a reloaded page keeps what was typed and chosen
  if (search.value || body.rows.length > FEW) filter();
  if (sort.value !== "size") order();
})();
