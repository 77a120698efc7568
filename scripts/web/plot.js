"use strict";
// A chart: uPlot draws axes, grid and the cursor's cross; curves, dots, hover and zoom are drawn and found here.

const REACH_PX = 40; // of the pointer to a point

class Plot {
  // host: an empty element. options:
  //   name, xLabel         for readers
  //   xLog, yLog           whether an axis is logarithmic
  //   limits()             {x: [low, high], y: [low, high]}
  //   series()             of each curve {xs, ys, color, width, alpha, dash, marker, isDots, low, high}; ys may be null
  //   tip(series, index)   what to show of a point, an element
  //   line                 {y, text} across the chart, or null
  //   onZoom(limits)       the reader has chosen a part; null: all of it again
  constructor(host, options) {
    this.host = host;
    this.options = options;
    this.tip = make("div", { class: "tip", hidden: true });
    this.ring = make("div", { class: "ring", hidden: true });
    this.said = make("p", { class: "unseen", "aria-live": "polite" });
    this.at = null; // [place of the series, index of the point]
    host.replaceChildren(this.said);
    host.tabIndex = 0;
    host.setAttribute("role", "application");
    host.setAttribute(
      "aria-label",
      `${options.name}. Left and right: next point. Up and down: next curve. ` + "Plus and minus: zoom. Escape: all.",
    );
    host.onkeydown = (event) => this.pressed(event);
    host.onblur = () => this.show(null);
    this.build();
    this.observer = new ResizeObserver(() => this.uplot.setSize(this.size()));
    this.observer.observe(host);
  }

  destroy() {
    this.observer.disconnect();
    this.uplot.destroy();
  }

  size() {
    return { width: Math.max(280, this.host.clientWidth), height: innerWidth < 700 ? 320 : 430 };
  }

  build() {
    const { xLog, yLog, xLabel } = this.options;
    const limits = this.options.limits();
    const font = "12px system-ui, sans-serif";
    const axis = (isLog, more) => ({
      stroke: () => themed("soft"),
      font,
      labelFont: font,
      grid: { stroke: () => themed("grid"), width: 1 },
      ticks: { show: false },
      splits: (u, _, low, high) => ticks(low, high, isLog, (more.side === 3 ? u.height : u.width) / more.perTick),
      filter: (u, splits) => splits,
      values: (u, splits) => splits.map(tickFormat(splits)),
      ...more,
    });
    const scale = (isLog, key) => ({ time: false, distr: isLog ? 3 : 1, range: () => this.options.limits()[key] });
    this.uplot = new uPlot(
      {
        ...this.size(),
        padding: [10, 14, 0, 0],
        scales: { x: scale(xLog, "x"), y: scale(yLog, "y") },
        series: [{}, { paths: () => null, points: { show: false } }],
        axes: [
          axis(xLog, { side: 2, label: xLabel, labelSize: 22, size: 30, perTick: 90 }),
          axis(yLog, { side: 3, size: 54, perTick: 46 }),
        ],
        legend: { show: false },
        cursor: {
          points: { show: false },
          drag: { x: true, y: true, setScale: false },
          bind: { dblclick: () => () => this.options.onZoom(null) },
        },
        hooks: {
          draw: [() => this.draw()],
          setCursor: [(u) => this.hover(u.cursor.left, u.cursor.top)],
          setSelect: [(u) => this.selected(u.select)],
        },
      },
      [limits.x, [null, null]],
      this.host,
    );
    this.uplot.over.append(this.ring);
    this.host.append(this.tip);
  }

  // After something else is to be shown.
  redraw() {
    this.shown = this.options.series();
    const { x, y } = this.options.limits();
    this.show(null);
    this.uplot.batch(() => {
      this.uplot.setData([x, [null, null]], false);
      this.uplot.setScale("x", { min: x[0], max: x[1] });
      this.uplot.setScale("y", { min: y[0], max: y[1] });
    });
    this.uplot.redraw();
  }

  draw() {
    const { ctx, bbox } = this.uplot;
    this.shown = this.options.series();
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.lineJoin = "round";
    for (const series of this.shown) this.drawBand(ctx, series);
    for (const series of this.shown) this.drawCurve(ctx, series);
    if (this.options.line) this.drawLine(ctx, this.options.line);
    ctx.restore();
  }

  // Places on the canvas; those that a logarithmic axis does not have are left out.
  places(xs, ys) {
    const { xLog, yLog } = this.options;
    const found = [];
    for (let i = 0; i < xs.length; i++) {
      const y = ys[i] === null ? this.options.limits().y[1] : ys[i];
      if ((xLog && xs[i] <= 0) || (yLog && y <= 0)) continue;
      found.push([this.uplot.valToPos(xs[i], "x", true), this.uplot.valToPos(y, "y", true), ys[i] === null]);
    }
    return found;
  }

  drawBand(ctx, { xs, low, high, color }) {
    if (!low) return;
    ctx.globalAlpha = 0.14;
    ctx.fillStyle = color;
    ctx.beginPath();
    for (const [x, y] of this.places(xs, low)) ctx.lineTo(x, y);
    for (const [x, y] of this.places(xs, high).reverse()) ctx.lineTo(x, y);
    ctx.fill();
  }

  drawCurve(ctx, { xs, ys, color, width, alpha, dash, marker, offset, isDots }) {
    const ratio = devicePixelRatio;
    const places = this.places(xs, ys);
    ctx.globalAlpha = alpha;
    ctx.strokeStyle = ctx.fillStyle = color;
    ctx.lineWidth = width * ratio;
    if (!isDots) {
      ctx.setLineDash(dash.map((length) => length * ratio));
      ctx.beginPath();
      for (const [x, y] of places) ctx.lineTo(x, y);
      ctx.stroke();
      ctx.setLineDash([]);
    }
    if (!marker) return;
    const every = isDots ? 1 : Math.max(1, Math.floor(places.length / 6)); // so that they do not cover each other
    for (let i = isDots ? 0 : Math.floor(offset * every); i < places.length; i += every) {
      const [x, y, isLost] = places[i];
      drawMarker(ctx, isLost ? "lost" : marker, x, isLost ? y + 8 * ratio : y, (isDots ? 5 : 3.6) * ratio);
    }
  }

  drawLine(ctx, { y, text }) {
    const { bbox } = this.uplot;
    const place = Math.round(this.uplot.valToPos(y, "y", true)) + 0.5;
    if (!(place > bbox.top && place < bbox.top + bbox.height)) return;
    ctx.globalAlpha = 1;
    ctx.strokeStyle = ctx.fillStyle = themed("ink");
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(bbox.left, place);
    ctx.lineTo(bbox.left + bbox.width, place);
    ctx.stroke();
    ctx.setLineDash([]);
    ctx.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
    ctx.textAlign = "left";
    ctx.textBaseline = "bottom";
    ctx.fillText(text, bbox.left + 6 * devicePixelRatio, place - 4 * devicePixelRatio);
  }

  // The nearest point that is in sight; of equals one of a curve that is drawn later, so above.
  nearest(left, top) {
    const {
      x: [x0, x1],
      y: [y0, y1],
    } = this.options.limits();
    let found = null;
    let best = REACH_PX;
    this.shown.forEach(({ xs, ys, width }, place) => {
      for (let i = 0; i < xs.length; i++) {
        if (xs[i] < x0 || xs[i] > x1 || (ys[i] !== null && (ys[i] < y0 || ys[i] > y1))) continue;
        const [x, y] = this.place(place, i);
        const distance = Math.hypot(x - left, y - top) - width; // a thick curve is meant rather than a thin one
        if (distance <= best) [found, best] = [[place, i], distance];
      }
    });
    return found;
  }

  // Of a point, in pixels from the corner of the area of the curves.
  place(series, index) {
    const { xs, ys } = this.shown[series];
    const isLost = ys[index] === null;
    const y = isLost ? this.options.limits().y[1] : ys[index];
    return [this.uplot.valToPos(xs[index], "x"), this.uplot.valToPos(y, "y") + (isLost ? 8 : 0)];
  }

  hover(left, top) {
    if (document.activeElement === this.host && left < 0) return; // the keyboard has chosen a point
    this.show(left < 0 ? null : this.nearest(left, top));
  }

  show(at) {
    this.at = at;
    this.tip.hidden = this.ring.hidden = !at;
    if (!at) return;
    const [left, top] = this.place(...at);
    const series = this.shown[at[0]];
    this.tip.replaceChildren(this.options.tip(series, at[1]));
    this.said.textContent = this.tip.innerText;
    this.ring.style.left = `${left}px`;
    this.ring.style.top = `${top}px`;
    this.ring.style.borderColor = series.color;
    this.placeTip(left + this.uplot.over.offsetLeft, top + this.uplot.over.offsetTop);
  }

  // Beside a point, or above or below it where the page is narrow, but never on it.
  placeTip(left, top) {
    const { offsetWidth: width, offsetHeight: height } = this.tip;
    const [right, bottom] = [this.host.clientWidth - width, this.host.clientHeight - height];
    const fits = left + 16 <= right ? left + 16 : left - 16 - width;
    const isBeside = fits >= 0;
    const x = isBeside ? fits : Math.max(0, Math.min(left - width / 2, right));
    const y = isBeside ? Math.max(0, Math.min(top - 20, bottom)) : top > height + 16 ? top - 16 - height : top + 16;
    this.tip.style.left = `${x}px`;
    this.tip.style.top = `${y}px`;
  }

  selected({ left, top, width, height }) {
    if (width < 6 || height < 6) return;
    const x = [this.uplot.posToVal(left, "x"), this.uplot.posToVal(left + width, "x")];
    const y = [this.uplot.posToVal(top + height, "y"), this.uplot.posToVal(top, "y")];
    this.uplot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.options.onZoom({ x, y });
  }

  pressed(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] };
    if (event.target !== this.host || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in moves && this.shown.length) this.move(...moves[event.key]);
    else if (event.key === "+" || event.key === "=") this.options.onZoom(this.scaled(0.5));
    else if (event.key === "-") this.options.onZoom(this.scaled(2));
    else if (event.key === "Escape") this.options.onZoom(null);
    else return;
    event.preventDefault();
  }

  // To the next point in sight of the same curve, or to another curve's point that is nearest.
  move(curves, points) {
    const [place, index] = this.at || [this.shown.length - 1, -1];
    const last = this.shown.length;
    const {
      x: [low, high],
    } = this.options.limits();
    const to = (place + curves + last) % last;
    const { xs } = this.shown[to];
    if (!xs.length) return;
    const inSight = [...xs.keys()].filter((i) => xs[i] >= low && xs[i] <= high);
    if (!inSight.length) return;
    if (!this.at) return this.show([to, inSight[0]]);
    if (points) return this.show([to, Math.min(Math.max(index + points, inSight[0]), inSight.at(-1))]);
    const here = this.shown[place].xs[index];
    this.show([to, inSight.reduce((a, b) => (Math.abs(xs[b] - here) < Math.abs(xs[a] - here) ? b : a))]);
  }

  // The limits so many times as wide, around their middle.
  scaled(factor) {
    const part = ([low, high], isLog) => {
      const [a, b] = isLog ? [Math.log(low), Math.log(high)] : [low, high];
      const ends = [(a + b) / 2 - (factor * (b - a)) / 2, (a + b) / 2 + (factor * (b - a)) / 2];
      return isLog ? ends.map(Math.exp) : ends;
    };
    const { x, y } = this.options.limits();
    return { x: part(x, this.options.xLog), y: part(y, this.options.yLog) };
  }
}

// Round numbers between two others, some `count` of them.
function ticks(low, high, isLog, count) {
  if (isLog && high / low >= 8) {
    const found = [];
    const some = Math.log10(high / low) * 3 > count ? [1] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      found.push(...some.map((digit) => digit * 10 ** power));
    return found.filter((value) => value >= low && value <= high);
  }
  const rough = (high - low) / Math.max(2, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((value) => value >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
  return found;
}

// All with as many decimals as the closest two need.
function tickFormat(splits) {
  const gaps = splits.slice(1).map((value, i) => value - splits[i]);
  const digits = Math.min(8, Math.max(0, -Math.floor(Math.log10(Math.min(...gaps, Math.abs(splits[0]) || 1)) + 1e-9)));
  const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 2 });
  return (value) => (Math.abs(value) >= 1e5 ? compact.format(value) : value.toFixed(splits.length > 1 ? digits : 3));
}

const MARKERS = {
  o: (ctx, r) => ctx.arc(0, 0, r, 0, 7),
  s: (ctx, r) => ctx.rect(-r * 0.9, -r * 0.9, r * 1.8, r * 1.8),
  "^": (ctx, r) =>
    polygon(ctx, [
      [0, -r * 1.2],
      [r * 1.1, r * 0.8],
      [-r * 1.1, r * 0.8],
    ]),
  v: (ctx, r) =>
    polygon(ctx, [
      [0, r * 1.2],
      [r * 1.1, -r * 0.8],
      [-r * 1.1, -r * 0.8],
    ]),
  D: (ctx, r) =>
    polygon(ctx, [
      [0, -r * 1.3],
      [r * 1.1, 0],
      [0, r * 1.3],
      [-r * 1.1, 0],
    ]),
  P: (ctx, r) =>
    [
      [-r * 0.4, -r * 1.2, r * 0.8, r * 2.4],
      [-r * 1.2, -r * 0.4, r * 2.4, r * 0.8],
    ].forEach((box) => ctx.rect(...box)),
  X: (ctx, r) => (ctx.rotate(Math.PI / 4), MARKERS.P(ctx, r)),
  lost: (ctx, r) => (
    ctx.rotate(Math.PI / 4),
    ctx.rect(-r * 0.2, -r * 1.3, r * 0.4, r * 2.6),
    ctx.rect(-r * 1.3, -r * 0.2, r * 2.6, r * 0.4)
  ),
};

function polygon(ctx, corners) {
  corners.forEach(([x, y], i) => (i ? ctx.lineTo(x, y) : ctx.moveTo(x, y)));
  ctx.closePath();
}

function drawMarker(ctx, name, x, y, radius) {
  ctx.save();
  ctx.translate(x, y);
  ctx.beginPath();
  if (name === "ring") (ctx.arc(0, 0, radius * 2, 0, 7), ctx.stroke());
  else ((MARKERS[name] || MARKERS.o)(ctx, radius), ctx.fill());
  ctx.restore();
}

// For fingers, which do not drag.
function makeZoomButtons(plotOf) {
  const button = (text, label, factor) =>
    make(
      "button",
      { type: "button", "aria-label": label, onclick: () => plotOf().options.onZoom(plotOf().scaled(factor)) },
      text,
    );
  return make("span", { class: "zooms" }, button("+", "Zoom in", 0.5), button("−", "Zoom out", 2));
}

// A piece of a curve beside its name, or only a dot.
function makeSwatch(style, isDot) {
  const canvas = make("canvas", { class: "swatch", width: 56, height: 24, "aria-hidden": "true" });
  const ctx = canvas.getContext("2d");
  ctx.strokeStyle = ctx.fillStyle = colorOf(style);
  ctx.lineWidth = style ? 4 : 2;
  ctx.setLineDash((style ? style.dash : []).map((length) => length * 2));
  ctx.beginPath();
  if (!isDot) ctx.moveTo(0, 12);
  if (!isDot) ctx.lineTo(56, 12);
  ctx.stroke();
  if (style) drawMarker(ctx, style.marker, 28, 12, 7.5);
  return canvas;
}
