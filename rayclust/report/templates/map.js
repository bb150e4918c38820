// The map: points on a canvas, with hovering, zoom, and a lasso that lists keys.
(() => {
  const { $, el, index, load, details, title, colour, count, plural, thumbnail, dark } = page;
  const canvas = $("points"), over = $("over"), tip = $("tip");
  if (!canvas) return;
  const SIDE = 65535, CELLS = 256, REACH = 9, NAMES = 14, MARGIN = 14;
  const N = index.points.count;
  const view = { scale: 1, x: 0, y: 0 }; // pixels = x + coordinate * fit * scale
  let xs, ys, clusters, starts, order, chosen = null, picked = null, frame = 0, fit = 1, ratio = 1, names = [];
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;

  // 1. Data, and cells of points so that the nearest is found at once.
  const cell = (value) => value >> 8;
  const prepare = (data) => {
    xs = new Uint16Array(bytes(data.x)); ys = new Uint16Array(bytes(data.y)); clusters = new Uint32Array(bytes(data.cluster));
    starts = new Uint32Array(CELLS * CELLS + 1); order = new Uint32Array(N);
    for (let i = 0; i < N; i++) starts[cell(ys[i]) * CELLS + cell(xs[i]) + 1]++;
    for (let i = 0; i < CELLS * CELLS; i++) starts[i + 1] += starts[i];
    const next = starts.slice();
    for (let i = 0; i < N; i++) order[next[cell(ys[i]) * CELLS + cell(xs[i])]++] = i;
    // Names stand at the median of the largest clusters' points, or above those that they would hide.
    const found = new Map();
    for (let i = 0; i < N; i++) if (clusters[i] < NAMES) (found.get(clusters[i]) ?? found.set(clusters[i], []).get(clusters[i])).push(i);
    const quantile = (some, values, share) => Float64Array.from(some, (i) => values[i]).sort()[Math.floor(share * (some.length - 1))];
    names = [...found].sort((a, b) => a[0] - b[0])
      .map(([place, some]) => ({ place, x: quantile(some, xs, 0.5), y: quantile(some, ys, 0.5), top: quantile(some, ys, 0.95) }));
  };
  const px = (x) => view.x + x * fit * view.scale, py = (y) => view.y + (SIDE - y) * fit * view.scale;

  // 2. Drawing: pixels are set one by one, which for 200,000 points takes some milliseconds.
  const draw = () => {
    const { width, height } = canvas, context = canvas.getContext("2d");
    if (!xs || !width || !height) return; // not loaded, or not on the screen
    const image = context.createImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    const size = Math.max(2, Math.round(ratio * Math.min(7, Math.sqrt(view.scale) * (N > 50000 ? 1.2 : N > 5000 ? 2 : 4))));
    const places = chosen === null ? null : chosen;
    const paints = new Uint32Array(index.id.length);
    for (let place = 0; place < paints.length; place++) {
      const [r, g, b] = colour(place), alpha = places === null || places === place ? 255 : 40;
      paints[place] = (alpha << 24) | (b << 16) | (g << 8) | r;
    }
    const half = size >> 1;
    for (let pass = places === null ? 1 : 0; pass < 2; pass++) { // what is chosen lies on top
      for (let i = 0; i < N; i++) {
        if (places !== null && (clusters[i] === places) !== (pass === 1)) continue;
        const left = Math.round(px(xs[i]) * ratio) - half, top = Math.round(py(ys[i]) * ratio) - half;
        if (left < 0 || top < 0 || left + size > width || top + size > height) continue;
        const paint = picked && !picked[i] ? (paints[clusters[i]] & 0xffffff) | (40 << 24) : paints[clusters[i]];
        for (let y = top; y < top + size; y++) pixels.fill(paint, y * width + left, y * width + left + size);
      }
    }
    context.putImageData(image, 0, 0);
    // Names, those of larger clusters first, where there is room.
    const style = getComputedStyle(document.documentElement), taken = [];
    context.font = `600 ${13 * ratio}px system-ui, sans-serif`;
    context.textAlign = "center"; context.textBaseline = "middle"; context.lineJoin = "round";
    context.lineWidth = 4 * ratio; context.strokeStyle = style.getPropertyValue("--card"); context.fillStyle = style.getPropertyValue("--ink");
    for (const name of names) {
      if (chosen !== null && chosen !== name.place) continue;
      const small = py(name.y) - py(name.top) < 24;
      const text = title(name.place).slice(0, 28), w = context.measureText(text).width / 2 + 4, at = px(name.x) * ratio;
      const x = Math.min(Math.max(at, w), width - w), y = (small ? py(name.top) - 14 : py(name.y)) * ratio;
      if (at < 0 || at > width || taken.some((box) => Math.abs(box[0] - x) < box[2] + w && Math.abs(box[1] - y) < 18 * ratio)) continue;
      taken.push([x, y, w]);
      context.strokeText(text, x, y);
      context.fillText(text, x, y);
    }
  };
  const redraw = () => { cancelAnimationFrame(frame); frame = requestAnimationFrame(draw); };
  const resize = () => {
    ratio = Math.min(2, devicePixelRatio || 1);
    const box = canvas.getBoundingClientRect();
    for (const each of [canvas, over]) { each.width = Math.round(box.width * ratio); each.height = Math.round(box.height * ratio); }
    fit = (Math.min(box.width, box.height) - 2 * MARGIN) / SIDE;
    whole();
  };
  const whole = () => {
    const box = canvas.getBoundingClientRect();
    view.scale = 1; view.x = (box.width - SIDE * fit) / 2; view.y = (box.height - SIDE * fit) / 2;
    redraw();
  };
  const zoom = (factor, x, y) => {
    const scale = Math.min(400, Math.max(0.5, view.scale * factor)), ratio = scale / view.scale;
    view.x = x - (x - view.x) * ratio; view.y = y - (y - view.y) * ratio; view.scale = scale;
    canvas.classList.toggle("near", scale > 1);
    redraw();
  };
  const middle = () => { const box = canvas.getBoundingClientRect(); return [box.width / 2, box.height / 2]; };

  // 3. What lies under the pointer.
  const nearest = (x, y) => {
    const at = (pixel, shift) => (pixel - shift) / (fit * view.scale), reach = REACH / (fit * view.scale);
    const cx = at(x, view.x), cy = SIDE - at(y, view.y), clip = (v) => Math.min(CELLS - 1, Math.max(0, v >> 8));
    let best = -1, least = reach * reach;
    for (let row = clip(cy - reach); row <= clip(cy + reach); row++) for (let column = clip(cx - reach); column <= clip(cx + reach); column++) {
      for (let k = starts[row * CELLS + column]; k < starts[row * CELLS + column + 1]; k++) {
        const i = order[k], distance = (xs[i] - cx) ** 2 + (ys[i] - cy) ** 2;
        if (distance < least && (chosen === null || clusters[i] === chosen)) { least = distance; best = i; }
      }
    }
    return best;
  };
  const keysFrom = (i) => load(`keys-${String(Math.floor(i / index.points.each)).padStart(5, "0")}`);
  let shown = -1, asked = 0; // the point under the pointer, and how often that changed
  const hover = async (x, y) => {
    const i = nearest(x, y);
    canvas.style.cursor = i >= 0 && !lasso ? "pointer" : "crosshair";
    if (i === shown) return;
    shown = i;
    const turn = ++asked;
    tip.hidden = i < 0;
    if (i < 0) return;
    const place = clusters[i];
    const name = el("b", {}, el("bdi", { textContent: title(place) })), key = el("span");
    tip.replaceChildren(name, key);
    tip.style.left = `${Math.min(x + 14, canvas.clientWidth - 170)}px`;
    tip.style.top = `${Math.max(0, y > canvas.clientHeight - 190 ? y - 190 : y + 14)}px`;
    try {
      const [its, found] = await Promise.all([keysFrom(i), details(place)]);
      if (turn !== asked) return; // the pointer went on, or away and back
      const text = its.key[i % index.points.each], row = its.row[i % index.points.each];
      key.textContent = text.split("/").pop();
      // Its own picture where it has one, else its cluster's most typical, which says so.
      const own = [...found.typical, ...found.borderline, ...found.outliers].find((each) => each[1] === row);
      const picture = own ?? found.typical[0];
      if (picture?.[6]) tip.prepend(el("figure", {}, thumbnail(picture, ""), own ? "" : el("figcaption", { textContent: "typical of its cluster" })));
    } catch { /* said above the list */ }
  };

  // 4. The lasso: keys of the images inside.
  const SHOWN = 1000;
  let lasso = false, path = [], keys = [];
  const trace = () => {
    const context = over.getContext("2d");
    context.clearRect(0, 0, over.width, over.height);
    if (path.length < 2) return;
    context.lineWidth = 2 * ratio; context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
    context.beginPath();
    path.forEach(([x, y]) => context.lineTo(x * ratio, y * ratio));
    context.closePath();
    context.stroke();
  };
  const pick = async () => {
    const inside = [], xp = path.map((p) => p[0]), yp = path.map((p) => p[1]);
    const [left, right, top, bottom] = [Math.min(...xp), Math.max(...xp), Math.min(...yp), Math.max(...yp)];
    for (let i = 0; i < N; i++) {
      const x = px(xs[i]), y = py(ys[i]);
      if (x < left || x > right || y < top || y > bottom) continue;
      let odd = false; // a ray to the left crosses the path an odd number of times
      for (let a = 0, b = path.length - 1; a < path.length; b = a++) {
        if ((yp[a] > y) !== (yp[b] > y) && x < (xp[b] - xp[a]) * (y - yp[a]) / (yp[b] - yp[a]) + xp[a]) odd = !odd;
      }
      if (odd) inside.push(i);
    }
    picked = new Uint8Array(N);
    for (const i of inside) picked[i] = 1;
    redraw();
    const counts = new Uint32Array(index.id.length);
    for (const i of inside) counts[clusters[i]]++;
    const sizes = [...counts.entries()].filter(([, size]) => size);
    const most = sizes.sort((a, b) => b[1] - a[1]).slice(0, 5).map(([place, size]) => `${title(place)} (${count(size)})`);
    $("picked").hidden = false;
    $("copy").textContent = "Copy keys";
    $("picked").querySelector("[role=status]").textContent = `${plural(inside.length, "image")} of ${plural(sizes.length, "cluster")}${most.length ? `: ${most.join(", ")}${sizes.length > 5 ? ", …" : ""}` : ""}`;
    const { each } = index.points, files = [...new Set(inside.map((i) => Math.floor(i / each)))];
    const read = new Map(await Promise.all(files.map(async (file) => [file, (await keysFrom(file * each)).key])));
    keys = inside.map((i) => read.get(Math.floor(i / each))[i % each]);
    $("keys").value = keys.slice(0, SHOWN).join("\n"); // a field of many thousand lines takes seconds to lay out
    $("rest").textContent = keys.length > SHOWN ? `These are the first ${count(SHOWN)} keys; copying and saving take all ${count(keys.length)}.` : "";
  };
  const unpick = () => { picked = null; path = []; $("picked").hidden = true; trace(); redraw(); };

  // 5. What the person does.
  let drag = null;
  const place = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.addEventListener("pointerdown", (event) => {
    drag = { at: place(event), moved: 0 };
    canvas.setPointerCapture(event.pointerId);
    if (lasso) path = [drag.at];
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = place(event);
    if (!xs) return;
    if (!drag) { hover(x, y); return; }
    const [dx, dy] = [x - drag.at[0], y - drag.at[1]];
    drag.moved += Math.abs(dx) + Math.abs(dy);
    drag.at = [x, y];
    if (lasso) { path.push([x, y]); trace(); } else if (drag.moved > 4) { tip.hidden = true; view.x += dx; view.y += dy; redraw(); }
  });
  canvas.addEventListener("pointerup", (event) => {
    const [x, y] = place(event), clicked = drag && drag.moved <= 4;
    drag = null;
    if (!xs) return;
    if (lasso && path.length > 2) pick();
    else if (clicked) { const i = nearest(x, y); if (i >= 0) location.hash = `#cluster-${index.id[clusters[i]]}`; else if (chosen !== null) { chosen = null; redraw(); } }
  });
  canvas.addEventListener("pointercancel", () => { drag = null; });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; shown = -1; asked++; });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey && document.activeElement !== canvas) return; // the page scrolls on
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 300), ...place(event));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] }[event.key];
    if (step) { view.x += step[0]; view.y += step[1]; redraw(); }
    else if (event.key === "+" || event.key === "=") zoom(1.4, ...middle());
    else if (event.key === "-") zoom(1 / 1.4, ...middle());
    else return;
    event.preventDefault();
  });
  $("zoom-in").addEventListener("click", () => zoom(1.6, ...middle()));
  $("zoom-out").addEventListener("click", () => zoom(1 / 1.6, ...middle()));
  $("zoom-all").addEventListener("click", () => { chosen = null; whole(); });
  $("lasso").addEventListener("click", () => { lasso = !lasso; $("lasso").ariaPressed = String(lasso); if (!lasso) unpick(); });
  $("unpick").addEventListener("click", unpick);
  $("copy").addEventListener("click", () => {
    document.addEventListener("copy", (event) => {
      event.clipboardData.setData("text/plain", keys.join("\n"));
      event.preventDefault();
      $("copy").textContent = "Copied";
    }, { once: true });
    document.execCommand("copy");
  });
  $("save").addEventListener("click", () => {
    const address = URL.createObjectURL(new Blob([`${keys.join("\n")}\n`], { type: "text/plain" }));
    el("a", { href: address, download: "keys.txt" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  });
  dark.addEventListener("change", redraw);
  page.onmap = (which) => { chosen = which; $("map").scrollIntoView(); whole(); };
  // Loaded when it comes near the window.
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    load("points").then((data) => { prepare(data); $("map-tools").hidden = false; canvas.dataset.ready = "1"; redraw(); }).catch(() => {});
  }, { rootMargin: "600px" }).observe(canvas);
  new ResizeObserver(resize).observe(canvas);
})();
