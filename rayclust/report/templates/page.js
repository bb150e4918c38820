// The list of clusters and the pages of clusters and pictures. Data comes from script elements of the page or, where
// they don't fit into it, from files beside it, each of which calls window.rayclust with its name and value.
const page = (() => {
  const $ = (id) => document.getElementById(id);
  const el = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  };
  const count = (value) => value.toLocaleString("en");
  const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;
  const percent = (permille) => permille === 1000 ? "100%" : permille > 0 && permille < 10 ? "<1%" : `${Math.floor(permille / 10)}%`;

  // 1. Data by name, each loaded once; packs that were not used for long are dropped.
  const KEPT = 60;
  const known = new Map();
  const waiting = new Map(); // files on their way
  window.rayclust = (name, value) => waiting.get(name)?.take(value);
  const read = (name) => {
    const inline = $(`data-${name}`);
    if (inline) return Promise.resolve(JSON.parse(inline.textContent));
    const script = el("script", { src: `data/${name}.js`, async: true });
    const found = new Promise((resolve, reject) => {
      const end = () => { waiting.delete(name); script.remove(); };
      waiting.set(name, { take: (value) => { end(); resolve(value); } });
      script.onerror = () => { end(); known.delete(name); $("gone").hidden = false; reject(new Error(name)); };
    });
    waiting.get(name).found = found;
    document.head.append(script);
    return found;
  };
  const load = (name) => {
    const found = known.get(name) ?? waiting.get(name)?.found ?? read(name);
    known.delete(name);
    known.set(name, found); // last in order: the most recently used
    if (known.size > KEPT) known.delete([...known.keys()].find((key) => key.startsWith("clusters-")) ?? name);
    return found;
  };
  const index = JSON.parse($("data-index").textContent);
  const K = index.id.length;
  const placeOf = new Map(index.id.map((id, place) => [id, place]));
  const details = async (place) => {
    let low = 0, high = index.packs.length;
    while (high - low > 1) { const middle = (low + high) >> 1; if (index.packs[middle] <= place) low = middle; else high = middle; }
    return (await load(`clusters-${String(low).padStart(5, "0")}`))[place - index.packs[low]];
  };

  // 2. What is said of a cluster.
  const runner = (place) => index.runners[place].length ? index.words[index.runners[place][0]] : null;
  const title = (place) => index.name[place] >= 0 ? index.words[index.name[place]]
    : runner(place) !== null ? `${runner(place)}?`
    : index.label[place] >= 0 ? `mostly ${index.classes[index.label[place]]}` : `#${index.id[place]}`;
  const bar = (place, share) => {
    const fill = el("i");
    fill.style.width = `${Math.max(0.5, 100 * share)}%`;
    fill.style.background = `rgb(${colour(place)})`;
    return el("div", { className: "share", ariaHidden: "true" }, fill);
  };
  const facts = (item) => {
    const list = el("ul", { className: "facts" });
    if (item.purity >= 0) {
      const kind = item.purity >= 800 ? "good" : item.purity >= 500 ? "fair" : "poor";
      const name = index.classes[item.label], label = item.label < 0 ? "one class" : /^\d+$/.test(name) ? `class ${name}` : name;
      list.append(el("li", { className: kind, title: "Share of its images in the class that most of them have" },
        `${percent(item.purity)} `, el("bdi", { textContent: label })));
    }
    if (item.confidence >= 0) list.append(el("li", { title: "Mean confidence of its images", textContent: `${percent(item.confidence)} sure` }));
    list.append(el("li", { className: "id", textContent: item.members ? plural(item.members.length, "cluster") : `#${index.id[item.place]}` }));
    return list;
  };
  const thumbnail = (picture, alt = picture[0]) => picture[6]
    ? el("img", { src: picture[6], alt, width: picture[7], height: picture[8], decoding: "async" })
    : el("span", { className: "bare", textContent: picture[0].split("/").pop() });

  // 3. The list: items are made for what is in view alone.
  const list = $("list"), items = $("items");
  const GAP = 16;
  const state = { items: [], most: 1, view: "cards", level: -1, group: null, columns: 1, width: 0, height: 0, nodes: new Map() };
  const single = (place) => ({ place, title: title(place), size: index.size[place], purity: index.purity[place],
    confidence: index.confidence[place], label: index.label[place] });
  const texts = index.id.map((id, place) => [title(place), `#${id}`, index.label[place] >= 0 ? index.classes[index.label[place]] : "",
    ...index.runners[place].map((word) => index.words[word])].join(" ").toLowerCase());
  const grouped = (places) => {
    const parents = index.levels[state.level].parent, groups = new Map();
    for (const place of places) {
      const group = groups.get(parents[place]) ?? { place, parent: parents[place], members: [], size: 0, purity: 0, confidence: 0, label: -1 };
      groups.set(parents[place], group);
      group.members.push(place);
      group.size += index.size[place];
      group.purity += index.purity[place] * index.size[place];
      group.confidence += index.confidence[place] * index.size[place];
    }
    for (const group of groups.values()) {
      const rest = group.members.length - 1;
      group.title = rest ? `${title(group.place)} and ${count(rest)} more` : title(group.place);
      group.purity = index.purity[group.place] < 0 ? -1 : group.purity / group.size;
      group.confidence = index.confidence[group.place] < 0 ? -1 : group.confidence / group.size;
    }
    return [...groups.values()];
  };
  const range = (name, scale) => {
    const read = (end, other) => { const value = $("ranges")[`${name}-${end}`]?.value; return value ? scale * value : other; };
    return [read("from", -Infinity), read("to", Infinity)];
  };
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
  const apply = () => {
    // a. Clusters that fit the words and the filters.
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const ranges = [["size", 1], ["purity", 10], ["confidence", 10]].map(([name, scale]) => [index[name], ...range(name, scale)])
      .filter(([, from, to]) => from > -Infinity || to < Infinity);
    const label = $("ranges").label?.value ?? "", named = $("ranges").named?.value ?? "";
    const places = [];
    for (let place = 0; place < K; place++) {
      if (state.group && index.levels[state.group.level].parent[place] !== state.group.parent) continue;
      if (!words.every((word) => texts[place].includes(word))) continue;
      if (!ranges.every(([column, from, to]) => column[place] >= from && column[place] <= to)) continue;
      if (label !== "" && index.label[place] !== +label) continue;
      if (named !== "" && (index.name[place] >= 0) !== (named === "1")) continue;
      places.push(place);
    }
    // b. In groups where a level is open, in order.
    const found = state.level >= 0 ? grouped(places) : places.map(single);
    const key = $("sort").value.replace("-", ""), sign = $("sort").value.startsWith("-") ? 1 : -1;
    if (key === "name") {
      const ids = (item) => index.name[item.place] < 0;
      found.sort((a, b) => ids(a) - ids(b) || (ids(a) ? index.id[a.place] - index.id[b.place] : collator.compare(a.title, b.title)) || a.place - b.place);
    } else found.sort((a, b) => (a[key] < 0) - (b[key] < 0) || sign * (a[key] - b[key]) || a.place - b.place);
    state.items = found;
    state.most = found.reduce((most, item) => Math.max(most, item.size), 1);
    const active = ranges.length + (label !== "") + (named !== "");
    $("filtered").textContent = active ? `${active} in use` : "";
    const images = places.reduce((sum, place) => sum + index.size[place], 0);
    $("found").textContent = places.length < K || state.level >= 0
      ? `${state.level >= 0 ? `${plural(found.length, "group")} of ` : ""}${count(places.length)} of ${plural(K, "cluster")}, ${plural(images, "image")}` : "";
    list.scrollTop = 0;
    layout();
  };
  const layout = () => {
    const inner = list.clientWidth - 2;
    const rows = state.view === "rows";
    state.columns = rows ? 1 : Math.max(1, Math.floor((inner + GAP) / (270 + GAP)));
    state.width = (inner - GAP * (state.columns - 1)) / state.columns;
    const side = (state.width - 34) / 3;
    state.height = rows ? 64 : Math.round(2 * side + 4 + 100);
    list.style.setProperty("--item-width", `${state.width}px`);
    list.style.setProperty("--item-height", `${state.height}px`);
    list.classList.toggle("rows", rows);
    const height = Math.max(0, Math.ceil(state.items.length / state.columns) * (state.height + gap()) - gap());
    items.style.height = `${height}px`;
    list.classList.toggle("whole", height < 1.5 * innerHeight); // a short one needs no scrolling of its own
    for (const node of state.nodes.values()) node.remove();
    state.nodes.clear();
    fill();
  };
  const gap = () => state.view === "rows" ? 4 : GAP;
  const fill = () => {
    const step = state.height + gap(), top = list.scrollTop, AHEAD = 1;
    const first = Math.max(0, Math.floor(top / step) - AHEAD) * state.columns;
    const last = Math.min(state.items.length, (Math.ceil((top + list.clientHeight) / step) + AHEAD) * state.columns);
    for (const [place, node] of state.nodes) {
      if ((place < first || place >= last) && !node.contains(document.activeElement)) { node.remove(); state.nodes.delete(place); }
    }
    for (let place = first; place < last; place++) {
      if (state.nodes.has(place)) continue;
      const node = card(state.items[place]);
      node.style.transform = `translate(${(place % state.columns) * (state.width + GAP)}px, ${Math.floor(place / state.columns) * step}px)`;
      node.ariaSetSize = String(state.items.length);
      node.ariaPosInSet = String(place + 1);
      state.nodes.set(place, node);
      // In the order of the list, so that Tab goes on as one reads.
      const after = [...state.nodes.keys()].filter((other) => other > place).sort((a, b) => a - b)[0];
      items.insertBefore(node, after === undefined ? null : state.nodes.get(after));
    }
  };
  const card = (item) => {
    const link = item.members
      ? el("a", { href: "#clusters", onclick: (event) => { event.preventDefault(); enter(item); } }, el("bdi", { textContent: item.title }))
      : el("a", { href: `#cluster-${index.id[item.place]}`, title: item.title }, el("bdi", { textContent: item.title }));
    const pictures = el("div", { className: "pictures" });
    const node = el("li", { className: "card" },
      el("div", { className: "head" }, el("h3", {}, link), el("p", { className: "size", textContent: plural(item.size, "image") })),
      bar(item.place, item.size / state.most), pictures, facts(item));
    const most = state.view === "rows" ? 4 : 6;
    const gallery = item.members
      ? Promise.all(item.members.slice(0, most).map(async (place) => (await details(place)).typical[0]))
      : details(item.place).then((found) => [...found.typical, ...found.borderline, ...found.outliers].slice(0, most));
    gallery.then((found) => pictures.append(...found.filter(Boolean).map((each) => thumbnail(each)))).catch(() => {});
    return node;
  };
  const enter = (group) => {
    state.group = { level: state.level, parent: group.parent, title: group.title, before: state.group };
    state.level -= 1; // the next finer one; below the finest are the clusters
    $("level").value = String(state.level);
    showScope();
  };
  const showScope = () => {
    $("scope").hidden = !state.group;
    if (state.group) $("scope").querySelector("span").textContent =
      `Level of ${count(index.levels[state.group.level].clusters)}: ${state.group.title}`;
    apply();
    if (state.group) $("leave").focus();
  };

  // 4. Pages of a cluster and of a picture.
  const dialog = $("cluster"), viewer = $("picture");
  const close = (box) => el("button", { type: "button", className: "close", ariaLabel: "Close", textContent: "×", onclick: () => box.close() });
  const clusterLink = (place, ...children) => el("a", { href: `#cluster-${index.id[place]}`, onclick: () => viewer.close() }, ...children);
  const caption = (picture, place) => {
    const [key, , confidence, label] = picture;
    const text = el("span", { className: "caption" }, el("bdi", { textContent: key.split("/").pop() }));
    if (confidence >= 0) text.append(el("span", { textContent: `${percent(confidence)} sure` }));
    if (label !== null) {
      // In a mixed cluster no picture is the wrong one.
      const differs = index.label[place] >= 0 && label !== index.classes[index.label[place]];
      const odd = differs && index.purity[place] >= 500;
      if (differs) text.append(el("span", { className: odd ? "other" : "" }, odd ? "labelled " : "", el("bdi", { textContent: label })));
    }
    return text;
  };
  const shelf = (heading, hint, pictures, place) => pictures.length === 0 ? null : el("section", {},
    el("h3", { textContent: heading }), el("p", { className: "hint", textContent: hint }),
    el("ul", { className: "shelf" }, ...pictures.map((picture) => el("li", {}, el("button", {
      type: "button", className: "tile", onclick: () => showPicture(picture, place),
    }, thumbnail(picture), caption(picture, place))))));
  const showCluster = async (place) => {
    const body = $("cluster-page");
    const item = single(place), said = facts(item);
    said.lastChild.remove(); // its number, which stands above
    const map = index.points ? el("button", { type: "button", textContent: "Show on the map", onclick: () => { dialog.close(); showOnMap(place); } }) : null;
    body.replaceChildren(close(dialog), el("h2", { id: "cluster-title" }, el("bdi", { textContent: item.title })),
      el("p", { className: "hint", textContent: `Cluster #${index.id[place]}, ${plural(item.size, "image")}, ${Number((100 * item.size / Math.max(1, index.images)).toPrecision(2))}% of all` }),
      said, map ?? "");
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    let found;
    try { found = await details(place); } catch { body.append(el("p", { className: "note", textContent: "Its pictures are missing." })); return; }
    const names = el("p", { className: "names" });
    const named = (pair) => [el("bdi", { textContent: pair[0] }), pair[1] === null ? "" : ` (${pair[1]})`];
    if (found.score !== null) names.append(`The name's score, larger for a better fit: ${found.score}. `);
    if (found.runners.length) names.append("Next best names: ", ...found.runners.flatMap((pair, i) => [i ? ", " : "", ...named(pair)]), ".");
    if (found.blind) names.append(" Without the classes' names: ", ...named(found.blind), ".");
    const near = el("ul", { className: "near" }), levels = el("p", { className: "names" });
    body.append(names, levels, ...[
      shelf("Typical", "Nearest to the middle of the cluster.", found.typical, place),
      shelf("Borderline", "Least certain, with neighbours in one other cluster.", found.borderline, place),
      shelf("Outliers", "Least certain, and near to no other cluster.", found.outliers, place),
      found.nearest.length ? el("section", {}, el("h3", { textContent: "Nearest clusters" }),
        el("p", { className: "hint", textContent: "By the cosine between their typical images." }), near) : null,
    ].filter(Boolean));
    for (const [id, cosine] of found.nearest) {
      const other = placeOf.get(id);
      if (other === undefined) continue;
      const link = clusterLink(other, el("bdi", { textContent: title(other) }), el("small", { textContent: ` ${cosine.toFixed(2)}` }));
      near.append(el("li", {}, link));
      details(other).then((its) => { if (its.typical[0]) link.prepend(thumbnail(its.typical[0], "")); }).catch(() => {});
    }
    index.levels.forEach((level, number) => {
      const parent = level.parent[place], size = level.parent.reduce((sum, each) => sum + (each === parent), 0);
      levels.append(el("button", { type: "button", textContent: `Level of ${count(level.clusters)}: with ${count(size - 1)} others`, onclick: () => {
        dialog.close(); state.level = number; enter({ parent, title: `like ${title(place)}` });
      } }), " ");
    });
  };
  // Originals: files of this machine and pages of the web can be opened, other places can be read.
  const address = (uri) => /^https?:\/\//.test(uri) ? uri
    : /^(file:\/\/)?\/(?!\/)[^#]*$/.test(uri) ? encodeURI(uri.startsWith("file:") ? uri : `file://${uri}`).replace(/\?/g, "%3F") : null;
  const showPicture = async (picture, place) => {
    const [key, row, confidence, label, uri, neighbors] = picture;
    const small = thumbnail(picture);
    const href = address(uri);
    const facts = el("dl", { className: "about" });
    const add = (name, ...value) => facts.append(el("div", {}, el("dt", { textContent: name }), el("dd", {}, ...value)));
    add("Key", el("bdi", { textContent: key }));
    if (row !== null) add("Row", count(row));
    add("Cluster", clusterLink(place, el("bdi", { textContent: title(place) })));
    if (confidence >= 0) add("Confidence", percent(confidence));
    if (label !== null) add("Class", el("bdi", { textContent: label }));
    if (uri) add("Original", href ? el("a", { href, target: "_blank", rel: "noopener noreferrer" }, el("bdi", { textContent: uri })) : el("bdi", { textContent: uri }));
    const near = el("ul", { className: "near" });
    const figure = el("div", { className: "large" }, small);
    $("picture-page").replaceChildren(close(viewer), el("h2", { id: "picture-title", className: "hidden", textContent: "Picture" }), figure, facts);
    if (neighbors.length) $("picture-page").append(el("h3", { textContent: "Nearest images" }),
      el("p", { className: "hint", textContent: "By the cosine of their embeddings. Those without a picture here are in the run's tables." }), near);
    if (!viewer.open) viewer.showModal();
    // The original in place of the thumbnail, where the page was opened from a disk that has it.
    if (href?.startsWith("file:") && location.protocol === "file:" && picture[6]) {
      const whole = el("img", { alt: key, src: href });
      whole.decode().then(() => { if (small.isConnected) small.replaceWith(whole); }).catch(() => {});
    }
    for (const [other, id, cosine] of neighbors) {
      const its = placeOf.get(id);
      const entry = el("li");
      near.append(entry);
      const said = el("span", {}, `row ${count(other)} `, el("small", { textContent: `${cosine.toFixed(2)}${its !== undefined && its !== place ? ` in ${title(its)}` : ""}` }));
      entry.append(its === undefined ? said : clusterLink(its, said));
      if (its === undefined) continue;
      details(its).then((found) => {
        const shown = [...found.typical, ...found.borderline, ...found.outliers].find((each) => each[1] === other);
        if (shown) entry.replaceChildren(el("button", { type: "button", className: "tile", onclick: () => showPicture(shown, its) }, thumbnail(shown), said));
      }).catch(() => {});
    }
  };
  const follow = () => {
    const place = placeOf.get(+(location.hash.match(/^#cluster-(\d+)$/)?.[1] ?? NaN));
    if (place !== undefined) showCluster(place);
  };

  // 5. What the person does.
  let timer = 0, frame = 0;
  $("search").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(apply, 60); });
  $("tools").addEventListener("submit", (event) => { event.preventDefault(); apply(); });
  $("sort").addEventListener("change", apply);
  $("view").addEventListener("change", () => { state.view = $("view").value; list.scrollTop = 0; layout(); });
  $("level")?.addEventListener("change", () => { state.level = +$("level").value; state.group = null; showScope(); });
  $("leave").addEventListener("click", () => { state.level = state.group.level; state.group = state.group.before; $("level").value = String(state.level); showScope(); });
  $("ranges").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(apply, 60); });
  $("ranges").addEventListener("reset", () => setTimeout(apply));
  $("ranges").addEventListener("submit", (event) => event.preventDefault());
  list.addEventListener("scroll", () => { cancelAnimationFrame(frame); frame = requestAnimationFrame(fill); }, { passive: true });
  let wide = 0;
  new ResizeObserver(() => { if (list.clientWidth !== wide) { wide = list.clientWidth; layout(); } else fill(); }).observe(list);
  dark.addEventListener("change", layout);
  addEventListener("hashchange", follow);
  for (const box of [dialog, viewer]) box.addEventListener("click", (event) => { if (event.target === box) box.close(); });
  dialog.addEventListener("close", () => history.replaceState(null, "", "#clusters"));
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName ?? "");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) { event.preventDefault(); $("search").focus(); }
  });
  const labels = $("ranges").label;
  labels?.append(...index.classes.map((name, place) => [name, place]).sort((a, b) => collator.compare(a[0], b[0]))
    .map(([name, place]) => el("option", { value: String(place), textContent: name })));
  // 6. The map; a lasso's keys can be copied and saved.
  const SHOWN = 1000;
  const keysFrom = (i) => load(`keys-${String(Math.floor(i / index.points.each)).padStart(5, "0")}`);
  const about = async (i, place) => {
    const [its, found] = await Promise.all([keysFrom(i), details(place)]);
    const at = i % index.points.each;
    // Its own picture where it has one, else its cluster's most typical, which says so.
    const own = [...found.typical, ...found.borderline, ...found.outliers].find((each) => each[1] === its.row[at]);
    const picture = own ?? found.typical[0];
    const figure = picture?.[6] ? el("figure", {}, thumbnail(picture, ""), own ? "" : el("figcaption", { textContent: "typical of its cluster" })) : null;
    return [its.key[at], figure];
  };
  let keys = [];
  const pick = async (inside) => {
    $("copy").textContent = "Copy keys";
    const { each } = index.points, files = [...new Set(inside.map((i) => Math.floor(i / each)))];
    const read = new Map(await Promise.all(files.map(async (file) => [file, (await keysFrom(file * each)).key])));
    keys = inside.map((i) => read.get(Math.floor(i / each))[i % each]);
    $("keys").value = keys.slice(0, SHOWN).join("\n"); // a field of many thousand lines takes seconds to lay out
    $("rest").textContent = keys.length > SHOWN ? `These are the first ${count(SHOWN)} keys; copying and saving take all ${count(keys.length)}.` : "";
  };
  $("copy")?.addEventListener("click", () => {
    document.addEventListener("copy", (event) => {
      event.clipboardData.setData("text/plain", keys.join("\n"));
      event.preventDefault();
      $("copy").textContent = "Copied";
    }, { once: true });
    document.execCommand("copy");
  });
  $("save")?.addEventListener("click", () => {
    const address = URL.createObjectURL(new Blob([`${keys.join("\n")}\n`], { type: "text/plain" }));
    el("a", { href: address, download: "keys.txt" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  });
  const open = (place) => { location.hash = `#cluster-${index.id[place]}`; };
  const showOnMap = index.points && pointMap({ N: index.points.count, K, data: () => load("points"), title, about, open, pick });

  $("tools").hidden = $("filters").hidden = K === 0;
  list.hidden = K === 0;
  // A reloaded page keeps what was typed and chosen.
  state.view = $("view").value;
  state.level = +($("level")?.value ?? -1);
  apply();
  follow();
  return { index };
})();
