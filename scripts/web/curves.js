"use strict";
// Validation loss of every seed, with mean and range of each optimizer.

let curvesPlot = null;

// What a task's records give for the chart, once: the steps of each run by reference.
function curvesOf(task) {
  if (!task.curves) {
    const own = ({ grid, seconds }) => ({ steps: task.grids[grid], seconds });
    task.curves = [
      ...task.runs.map((run) => ({ ...run, ...own(run), isMean: false })),
      ...task.means.map((mean, group) => ({ ...mean, ...own(mean), losses: mean.mean, group, isMean: true })),
    ].filter((curve) => curve.steps.length);
    // Those in front are drawn last, means above seeds.
    task.curves.sort((a, b) => a.isMean - b.isMean || b.group - a.group);
  }
  return task.curves;
}

function labelsOf(task) {
  return task.numbers.groups.map((group) => group.label);
}

function xsOf(task, curve) {
  if (state.x === "seconds") return curve.seconds;
  return state.x === "tokens" ? curve.steps.map((step) => step * task.batch_tokens) : curve.steps;
}

function shownCurves(task) {
  const labels = labelsOf(task);
  return curvesOf(task).filter((curve) => {
    if (state.off.has(labels[curve.group])) return false;
    if (curve.isMean) return !state.hide.includes("m") || !state.hide.includes("r");
    return !state.hide.includes("s") && !state.seedsOff.has(String(curve.seed));
  });
}

function seriesOf(task) {
  const isCrowded = task.runs.length > 60;
  return shownCurves(task).map((curve) => {
    const style = task.styles[curve.group];
    const isLine = curve.isMean && !state.hide.includes("m");
    return {
      curve,
      xs: xsOf(task, curve),
      ys: curve.losses,
      low: curve.isMean && !state.hide.includes("r") && style ? curve.low : null,
      high: curve.high,
      color: colorOf(style),
      width: isLine ? (style ? 2.25 : 1.25) : curve.isMean ? 0 : 1,
      alpha: curve.isMean ? (isLine ? 1 : 0) : isCrowded ? 0.15 : 0.35,
      dash: curve.isMean && style ? style.dash : [],
      marker: isLine && style ? style.marker : null,
      offset: curve.group / Math.max(1, task.styles.length),
    };
  });
}

function curveLimits(task) {
  const near = task.near_target;
  if (state.zoom && zoomOf(state.zoom)) return inRange(zoomOf(state.zoom), task);
  if (state.view === "near" && near) return inRange({ x: xAtSteps(task, near.x), y: near.y }, task);
  const from = state.view === "all" ? 0 : task.shown_from; // the fall from an untrained model's loss squeezes all else
  const x = [Infinity, -Infinity];
  const y = [task.numbers.target, task.numbers.target];
  for (const curve of curvesOf(task)) {
    const xs = xsOf(task, curve);
    const last = curve.steps.at(-1);
    curve.steps.forEach((step, i) => {
      if (step < from * last) return;
      x[0] = Math.min(x[0], xs[i]);
      x[1] = Math.max(x[1], xs[i]);
      y[0] = Math.min(y[0], curve.losses[i]);
      y[1] = Math.max(y[1], curve.losses[i]);
    });
  }
  if (!(x[1] > x[0])) x.splice(0, 2, 0, (x[1] > 0 ? x[1] : 1) * 1.1);
  const room = (y[1] - y[0] || 1) * 0.04;
  return inRange({ x: [x[0], x[1] + 0.01 * (x[1] - x[0])], y: [y[0] - room, y[1] + room] }, task);
}

// A logarithmic axis begins above 0.
function inRange({ x, y }, task) {
  const positive = ([low, high], smallest) => (low > 0 ? [low, high] : [smallest, Math.max(high, 2 * smallest)]);
  const first = () => {
    let smallest = 1e9;
    for (const curve of curvesOf(task))
      for (const value of xsOf(task, curve)) if (value > 0) smallest = Math.min(smallest, value);
    return smallest;
  };
  return {
    x: state.log.includes("x") ? positive(x, x[0] > 0 ? x[0] : first()) : x,
    y: state.log.includes("y") ? positive(y, 1e-3) : y,
  };
}

// Where the part between two steps lies on the chosen axis; in seconds from the fastest to the slowest run.
function xAtSteps(task, [from, to]) {
  if (state.x === "steps") return [from, to];
  if (state.x === "tokens") return [from * task.batch_tokens, to * task.batch_tokens];
  const paces = curvesOf(task)
    .filter(({ steps }) => steps.at(-1) > 0)
    .map(({ steps, seconds }) => seconds.at(-1) / steps.at(-1));
  return [from * Math.min(...paces), to * Math.max(...paces)];
}

function curveTip(task, { curve }, index) {
  const labels = labelsOf(task);
  const step = curve.steps[index];
  const of = curve.isMean ? `mean of ${task.numbers.groups[curve.group].seeds.length}` : `seed ${curve.seed}`;
  const range =
    curve.isMean && curve.high[index] > curve.low[index]
      ? ` (${fixed(curve.low[index], 4)} to ${fixed(curve.high[index], 4)})`
      : "";
  const rows = shownCurves(task)
    .filter((other) => other.isMean && other !== curve && other.group < task.styles.length)
    .map((other) => [other, other.steps.indexOf(step)])
    .filter(([, place]) => place >= 0)
    .reverse();
  return make(
    "div",
    {},
    make("strong", {}, make("span", { class: "name" }, labels[curve.group]), `, ${of}`),
    make("div", { class: "value" }, fixed(curve.losses[index], 4), make("small", {}, range)),
    make(
      "div",
      { class: "where" },
      `step ${whole(step)} · ${whole(step * task.batch_tokens)} tokens · ${fixed(curve.seconds[index], 1)} s`,
    ),
    rows.length
      ? make(
          "table",
          {},
          make("caption", {}, "means at this step"),
          ...rows.map(([other, place]) =>
            make(
              "tr",
              {},
              make("td", { class: "name" }, labels[other.group]),
              make("td", {}, fixed(other.losses[place], 4)),
            ),
          ),
        )
      : null,
  );
}

function makeCurves(section, task, afterToggle) {
  const host = make("div", { class: "plot" });
  const redraw = () => (saveState(), curvesPlot.redraw());
  const rebuild = () => (saveState(), makeCurves(section, task, afterToggle));
  const setView = (view) => ((state.view = view), (state.zoom = ""), rebuild());
  const toggled = () => (redraw(), afterToggle());
  const keepFocus = document.activeElement && document.activeElement.value;
  const letter = (key, name, label, isShown, after) =>
    makeCheck(
      label,
      isShown === state[key].includes(name),
      (isOn) => (setLetter(key, name, isOn === isShown), after()),
    );
  const views = [
    ["overview", "Overview"],
    ["near", "Near the target"],
    ["all", "All points"],
  ];
  const controls = make(
    "div",
    { class: "controls" },
    makeChoice(
      "x axis",
      [
        ["steps", "Steps"],
        ["tokens", "Tokens"],
        ["seconds", "Seconds"],
      ],
      state.x,
      (x) => ((state.x = x), (state.zoom = ""), rebuild()),
    ),
    makeChoice(
      "View",
      views.filter(([name]) => name !== "near" || task.near_target),
      state.zoom ? "" : state.view,
      setView,
    ),
    make(
      "div",
      { class: "checks" },
      letter("log", "x", "log x", true, rebuild),
      letter("log", "y", "log y", true, rebuild),
      letter("hide", "m", "means", false, redraw),
      letter("hide", "r", "ranges", false, redraw),
      letter("hide", "s", "seeds", false, redraw),
    ),
  );
  section.replaceChildren(
    make("h2", {}, "Validation loss"),
    controls,
    makeToggles(task, toggled),
    make("p", { class: "axis" }, "validation loss, nats per token"),
    host,
    make(
      "p",
      { class: "hint" },
      make("span", { class: "mouse" }, "Drag to zoom, double-click to go back. "),
      "Bands are the range of all seeds. ",
      makeZoomButtons(() => curvesPlot),
      makeCsvButtons("curves", () => curveRows(task)),
    ),
  );
  if (curvesPlot) curvesPlot.destroy();
  curvesPlot = new Plot(host, {
    name: "Validation loss",
    xLabel: { steps: "steps", tokens: "tokens", seconds: "timed training seconds" }[state.x],
    xLog: state.log.includes("x"),
    yLog: state.log.includes("y"),
    limits: () => curveLimits(task),
    series: () => seriesOf(task),
    tip: (series, index) => curveTip(task, series, index),
    line: { y: task.numbers.target, text: `target ${task.numbers.target}` },
    onZoom: (limits) => {
      state.zoom = limits ? [...limits.x, ...limits.y].map((value) => Number(value.toPrecision(6))).join(",") : "";
      if (!limits) state.view = "overview";
      saveState();
      for (const radio of section.querySelectorAll("[name='choice-View']"))
        radio.checked = !state.zoom && radio.value === state.view;
      curvesPlot.redraw();
    },
  });
  const chosen = keepFocus && section.querySelector(`input[type=radio][value="${CSS.escape(keepFocus)}"]`);
  if (chosen) chosen.focus();
}

// Which optimizers and seeds are shown; with the look of their curves it is the legend, too.
function makeToggles(task, toggled) {
  const labels = labelsOf(task);
  const one = (label, group) =>
    makeCheck(
      label,
      !state.off.has(label),
      (isOn) => (setMember(state.off, label, !isOn), toggled()),
      makeSwatch(task.styles[group]),
    );
  const legend = make("div", { class: "legend", role: "group", "aria-label": "optimizers" }, ...labels.map(one));
  const seeds = [...new Set(task.runs.map((run) => String(run.seed)))].sort((a, b) => a - b);
  const chips = make("div", { class: "chips", role: "group", "aria-label": "seeds" });
  const fillChips = () =>
    chips.replaceChildren(
      ...seeds.map((seed) =>
        makeCheck(seed, !state.seedsOff.has(seed), (isOn) => (setMember(state.seedsOff, seed, !isOn), toggled())),
      ),
    );
  const all = (isOn) => () => ((state.seedsOff = new Set(isOn ? [] : seeds)), fillChips(), toggled());
  fillChips();
  const button = (text, isOn) => make("button", { type: "button", onclick: all(isOn) }, text);
  const inner = make(
    "details",
    { open: state.seedsOff.size > 0 },
    make("summary", {}, `Seeds (${seeds.length})`),
    chips,
    button("All", true),
    button("None", false),
  );
  return make("div", { class: "toggles" }, legend, seeds.length > 1 ? inner : null);
}

function curveRows(task) {
  const labels = labelsOf(task);
  const rows = [["optimizer", "seed", "step", "tokens", "seconds", "val_loss"]];
  for (const curve of shownCurves(task).filter((curve) => !curve.isMean))
    curve.steps.forEach((step, i) =>
      rows.push([labels[curve.group], curve.seed, step, step * task.batch_tokens, curve.seconds[i], curve.losses[i]]),
    );
  return rows;
}
