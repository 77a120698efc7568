"use strict";
// Tuning: the loss of every trial against one hyper-parameter.

let tuningPlot = null;

function makeTuning(section) {
  const ledgers = data.tuning;
  section.hidden = !ledgers.length;
  if (!ledgers.length) return;
  const host = make("div", { class: "plot" });
  const optimizers = ledgers.flatMap((ledger) => ledger.optimizers);
  const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
  const settings = optimizers.flatMap(({ trials }) => trials.map((trial) => trial.setting));
  const knobs = [...new Set(settings.flatMap((setting) => Object.keys(setting)))].filter((knob) =>
    settings.some((setting) => isNumber(setting[knob])),
  );
  const knob = knobs.includes(state.knob) ? state.knob : knobs[0];
  const points = optimizers
    .map(({ optimizer, trials, style }) => {
      const own = trials.filter((trial) => isNumber(trial.setting[knob]));
      return { optimizer, own, xs: own.map((trial) => trial.setting[knob]), ys: own.map((trial) => trial.loss), style };
    })
    .filter(({ own }) => own.length);
  const xs = points.flatMap((series) => series.xs);
  const ys = points.flatMap((series) => series.ys).filter((value) => value !== null);
  const isLog = Math.min(...xs) > 0 && Math.max(...xs) / Math.min(...xs) > 4;
  const words = (setting) =>
    Object.entries(setting)
      .map(([key, value]) => `${key} ${Array.isArray(value) ? value.join(" ") : value}`)
      .join(", ");
  const full = () => {
    const [low, high] = [Math.min(...xs), Math.max(...xs)];
    const best = Math.min(...ys);
    const sorted = [...ys].sort((a, b) => a - b);
    // A few that are far off would squeeze all else.
    const top = Math.max(sorted[Math.floor(sorted.length * 0.9)] ?? best, best + 0.01);
    const room = (top - best) * 0.08;
    return {
      x: isLog ? [low / 1.15, high * 1.15] : [low - (high - low || 1) * 0.05, high + (high - low || 1) * 0.05],
      y: [best - room, top + 2 * room],
    };
  };
  let limits = full();
  if (tuningPlot) tuningPlot.destroy();
  tuningPlot = null;
  const select = makeSelect(
    "Hyper-parameter",
    knobs.map((name) => [name, name]),
    knob,
    (name) => {
      state.knob = name;
      saveState();
      makeTuning(section);
      section.querySelector("select").focus();
    },
  );
  const rows = optimizers.flatMap(({ optimizer, trials }) =>
    trials.map((trial) => [
      optimizer,
      trial.trial,
      trial.why,
      words(trial.setting),
      trial.loss === null ? "diverged" : `${trial.loss.toFixed(5)}${trial.chosen ? " (chosen)" : ""}`,
    ]),
  );
  const header = ["optimizer", "trial", "why", "setting", "val loss"];
  section.replaceChildren(
    make("h2", {}, "Tuning"),
    ...ledgers
      .filter((ledger) => ledger.error)
      .map((ledger) => make("p", { class: "warning" }, `${ledger.name}: ${ledger.error}`)),
    ...(ys.length
      ? [
          make("div", { class: "controls" }, select),
          make(
            "div",
            { class: "legend" },
            ...points.map(({ optimizer, style }) =>
              make("span", { class: "check" }, makeSwatch(style, true), make("span", { class: "name" }, optimizer)),
            ),
          ),
          make("p", { class: "axis" }, "validation loss at the end, nats per token"),
          host,
          make(
            "p",
            { class: "hint" },
            "Every trial is a dot; rings are the chosen ones, crosses at the top diverged. ",
            "Losses far above the rest lie beyond the chart: ",
            "zoom out to see them. ",
            makeZoomButtons(() => tuningPlot),
            makeCsvButtons("trials", () => [header, ...rows]),
          ),
        ]
      : []),
    make("details", {}, make("summary", {}, `All trials (${rows.length})`), makeTable(header, rows, "trials")),
  );
  if (!ys.length) return;
  tuningPlot = new Plot(host, {
    name: "Loss of every trial",
    xLabel: knob,
    xLog: isLog,
    yLog: false,
    limits: () => limits,
    series: () =>
      points.flatMap(({ own, xs, ys, style, optimizer }) => {
        const look = { own, optimizer, isDots: true, color: colorOf(style), width: 1, dash: [], alpha: 0.8 };
        const chosen = own.findIndex((trial) => trial.chosen);
        const around = { ...look, xs: [xs[chosen]], ys: [ys[chosen]], own: [own[chosen]], marker: "ring", width: 2 };
        return [{ ...look, xs, ys, marker: style.marker }, ...(chosen >= 0 ? [around] : [])];
      }),
    tip: ({ own, optimizer }, i) =>
      make(
        "div",
        {},
        make(
          "strong",
          {},
          make("span", { class: "name" }, optimizer),
          `, trial ${own[i].trial}${own[i].chosen ? ", chosen" : ""}`,
        ),
        make("div", { class: "value" }, own[i].loss === null ? "diverged" : own[i].loss.toFixed(5)),
        make("div", { class: "where" }, words(own[i].setting)),
      ),
    line: null,
    onZoom: (chosen) => ((limits = chosen || full()), tuningPlot.redraw()),
  });
}
