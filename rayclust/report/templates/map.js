"use strict";
// The map of the report and of the explorer: points on a canvas, with hovering, zoom, and a lasso.
const dark = matchMedia("(prefers-color-scheme: dark)");
// One colour for each cluster: hues a golden angle apart at three lightnesses that stand out from the ground (OKLCH).
const colour = (place) => {
  const L = (dark.matches ? [0.8, 0.7, 0.88] : [0.56, 0.64, 0.48])[place % 3], C = 0.13, h = place * 2.399963;
  const a = C * Math.cos(h), b = C * Math.sin(h);
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3, m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3,
    s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s, -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s]
    .map((v) => Math.round(255 * Math.min(1, Math.max(0, v <= 0.0031308 ? 12.92 * v : 1.055 * v ** (1 / 2.4) - 0.055))));
};
// The bytes of a column in base64.
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
// What the page gives: the number of points N and of clusters K; data(), a promise of x, y and cluster, each point's place in
// the list of clusters, as base64; title(place) of a cluster; about(i, place), a promise of a point's key and of a figure
// or null; open(place); pick(points), called with those in the lasso; and a signal that ends the map.
const pointMap = ({ N, K, data, title, about, open, pick, signal }) => {
  const $ = (id) => document.getElementById(id), count = (value) => value.toLocaleString("en");
  const canvas = $("points"), over = $("over"), tip = $("tip");
  const SIDE = 65535, CELLS = 256, REACH = 9, NAMES = 14, MARGIN = 14;
  const view = { scale: 1, x: 0, y: 0 }; // pixels = x + coordinate * fit * scale
  let xs, ys, clusters, starts, order, chosen = null, picked = null, frame = 0, fit = 1, ratio = 1, names = [];

  // 1. Data, and cells of points so that the nearest is found at once.
  const cell = (value) => value >> 8;
  const prepare = (found) => {
    xs = new Uint16Array(bytes(found.x)); ys = new Uint16Array(bytes(found.y)); clusters = new Uint32Array(bytes(found.cluster));
    starts = new Uint32Array(CELLS * CELLS + 1); order = new Uint32Array(N);
    for (let i = 0; i < N; i++) starts[cell(ys[i]) * CELLS + cell(xs[i]) + 1]++;
    for (let i = 0; i < CELLS * CELLS; i++) starts[i + 1] += starts[i];
    const next = starts.slice();
    for (let i = 0; i < N; i++) order[next[cell(ys[i]) * CELLS + cell(xs[i])]++] = i;
    // Names stand at the median of the largest clusters' points, or above those that they would hide.
    const largest = new Map();
    for (let i = 0; i < N; i++) if (clusters[i] < NAMES) (largest.get(clusters[i]) ?? largest.set(clusters[i], []).get(clusters[i])).push(i);
    const quantile = (some, values, share) => Float64Array.from(some, (i) => values[i]).sort()[Math.floor(share * (some.length - 1))];
    names = [...largest].sort((a, b) => a[0] - b[0])
      .map(([place, some]) => ({ place, x: quantile(some, xs, 0.5), y: quantile(some, ys, 0.5), top: quantile(some, ys, 0.95) }));
  };
  const px = (x) => view.x + x * fit * view.scale, py = (y) => view.y + (SIDE - y) * fit * view.scale;

  // 2. Drawing: pixels are set one by one, which for 200,000 points takes some milliseconds.
  const draw = () => {
    const { width, height } = canvas, context = canvas.getContext("2d");
    if (!xs || !width || !height) return; // not loaded, or not on the screen
    const image = context.createImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    const size = Math.max(2, Math.round(ratio * Math.min(7, Math.sqrt(view.scale) * (N > 50000 ? 1.2 : N > 5000 ? 2 : 4))));
    const paints = new Uint32Array(K);
    for (let place = 0; place < paints.length; place++) {
      const [r, g, b] = colour(place), alpha = chosen === null || chosen === place ? 255 : 40;
      paints[place] = (alpha << 24) | (b << 16) | (g << 8) | r;
    }
    const half = size >> 1;
    for (let pass = chosen === null ? 1 : 0; pass < 2; pass++) { // what is chosen lies on top
      for (let i = 0; i < N; i++) {
        if (chosen !== null && (clusters[i] === chosen) !== (pass === 1)) continue;
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
    const name = document.createElement("b"), key = document.createElement("span");
    name.append(Object.assign(document.createElement("bdi"), { textContent: title(place) }));
    tip.replaceChildren(name, key);
    tip.style.left = `${Math.min(x + 14, canvas.clientWidth - 170)}px`;
    tip.style.top = `${Math.max(0, y > canvas.clientHeight - 190 ? y - 190 : y + 14)}px`;
    try {
      const [text, figure] = await about(i, place);
      if (turn !== asked) return; // the pointer went on, or away and back
      key.textContent = text.split("/").pop();
      if (figure) tip.prepend(figure);
    } catch { /* the page says it elsewhere */ }
  };

  // 4. The lasso: the images inside.
  let lasso = false, path = [];
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
  const take = () => {
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
    const counts = new Uint32Array(K);
    for (const i of inside) counts[clusters[i]]++;
    const sizes = [...counts.entries()].filter(([, size]) => size);
    const most = sizes.sort((a, b) => b[1] - a[1]).slice(0, 5).map(([place, size]) => `${title(place)} (${count(size)})`);
    $("picked").hidden = false;
    const images = `${count(inside.length)} image${inside.length === 1 ? "" : "s"}`, of = `${count(sizes.length)} cluster${sizes.length === 1 ? "" : "s"}`;
    $("picked").querySelector("[role=status]").textContent = `${images} of ${of}${most.length ? `: ${most.join(", ")}${sizes.length > 5 ? ", …" : ""}` : ""}`;
    pick(inside);
  };
  const unpick = () => { picked = null; path = []; $("picked").hidden = true; trace(); redraw(); };

  // 5. What the person does.
  let drag = null;
  const place = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.addEventListener("pointerdown", (event) => {
    drag = { at: place(event), moved: 0 };
    tip.hidden = true;
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
    if (lasso && path.length > 2) take();
    else if (clicked) { const i = nearest(x, y); if (i >= 0) open(clusters[i]); else if (chosen !== null) { chosen = null; redraw(); } }
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
  dark.addEventListener("change", redraw, { signal });
  // Loaded when it comes near the window.
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    data().then((found) => { prepare(found); $("map-tools").hidden = false; canvas.dataset.ready = "1"; redraw(); }).catch(() => {});
  }, { rootMargin: "600px" }).observe(canvas);
  new ResizeObserver(resize).observe(canvas);
  // Show one cluster alone.
  return (place) => { chosen = place; $("map").scrollIntoView(); whole(); };
};
