"use strict";
// Steps and seconds to the target, every seed a dot; the tables of statistics; and where time went.

function makeTarget(section, task) {
  const shown = task.numbers.groups
    .map((group, index) => ({ group, index }))
    .filter(({ group }) => !state.off.has(group.label));
  const panel = (title, key, coordinate, column) => {
    const spans = shown.flatMap(({ group }) => spanOf(group, key, coordinate));
    const axis = spans.length ? axisOf(Math.min(...spans), Math.max(...spans)) : null;
    return make(
      "div",
      { class: "panel" },
      make("h3", {}, title),
      ...folded(shown.map(({ group, index }) => arrivalRow(task, group, index, key, coordinate, column, axis))),
      axis ? axisRow(axis) : make("p", { class: "hint" }, "No run has met the target."),
    );
  };
  section.replaceChildren(
    make("h2", {}, `To the target, ${task.numbers.target} nats per token`),
    make(
      "div",
      { class: "two" },
      panel("Steps", "steps_to_target", "step", 8),
      panel("Seconds", "seconds_to_target", "time_s", 9),
    ),
    make(
      "p",
      { class: "hint" },
      "Dots are seeds, the bar is the mean, the shade its 95 % interval. ",
      "An open triangle is a run that did not arrive. ",
      makeCsvButtons("to_target", () => arrivalRows(task)),
    ),
  );
}

function spanOf(group, key, coordinate) {
  const { bracket, interval, restricted_mean } = group[key];
  const dots = bracket ? bracket : group.crossings.filter(Boolean).map((hit) => hit[coordinate]);
  return [...dots, interval.low, interval.high, dots.length ? restricted_mean : null].filter((value) => value !== null);
}

function axisOf(low, high) {
  const room = (high - low || high || 1) * 0.07;
  return { low: Math.max(0, low - room), high: high + room };
}

function percent(axis, value) {
  return `${(100 * (value - axis.low)) / (axis.high - axis.low)}%`;
}

function arrivalRow(task, group, index, key, coordinate, column, axis) {
  const track = makeSvg("svg", {
    class: "track",
    role: "img",
    "aria-label": `${group.label}: ${task.table.rows[index][column]}`,
  });
  track.style.color = colorOf(task.styles[index]);
  if (axis) drawArrivals(track, group, index, key, coordinate, axis);
  return make(
    "div",
    { class: "arrival" },
    make("span", { class: "name" }, group.label),
    make("span", { class: "value" }, task.table.rows[index][column]),
    track,
  );
}

function drawArrivals(track, group, index, key, coordinate, axis) {
  const { bracket, interval, restricted_mean, count, runs } = group[key];
  const box = (low, high, name) =>
    track.append(
      makeSvg("rect", {
        x: percent(axis, low),
        width: `${(100 * (high - low)) / (axis.high - axis.low)}%`,
        y: 3,
        height: 24,
        rx: 3,
        class: name,
      }),
    );
  if (bracket) return box(...bracket, "bracket");
  if (interval.low !== null) box(interval.low, interval.high, "interval");
  group.crossings.forEach((hit, i) => {
    if (state.seedsOff.has(String(group.seeds[i]))) return;
    const y = 15 + 5 * ((i % 3) - 1); // apart, where seeds arrive together
    const path = `groups.${index}.crossings.${i}.${coordinate}`;
    const title = makeSvg("title", {}, `seed ${group.seeds[i]}: ${hit ? hit[coordinate].toFixed(1) : "not reached"}`);
    track.append(
      hit
        ? makeSvg(
            "circle",
            { cx: percent(axis, hit[coordinate]), cy: y, r: 4, "data-path": path, "data-value": hit[coordinate] },
            title,
          )
        : makeSvg(
            "svg",
            { x: "100%", y: y - 5, class: "lost", overflow: "visible" },
            makeSvg("path", { d: "M-10 0L-1 5L-10 10Z" }),
            title,
          ),
    );
  });
  if (count && count === runs) {
    const x = percent(axis, restricted_mean);
    track.append(makeSvg("line", { x1: x, x2: x, y1: 1, y2: 29, class: "mean" }));
  }
}

function axisRow(axis) {
  const marks = ticks(axis.low, axis.high, false, 5);
  const text = tickFormat(marks);
  const scale = makeSvg("svg", { class: "track scale", "aria-hidden": "true" });
  for (const mark of marks)
    scale.append(makeSvg("text", { x: percent(axis, mark), y: 14, "text-anchor": "middle" }, text(mark)));
  return make("div", { class: "arrival" }, scale);
}

function arrivalRows(task) {
  const rows = [["optimizer", "seed", "steps_to_target", "seconds_to_target", "loss_at_end", "status"]];
  for (const group of task.numbers.groups)
    group.crossings.forEach((hit, i) =>
      rows.push([
        group.label,
        group.seeds[i],
        hit?.step,
        hit?.time_s,
        group.losses.length === group.seeds.length ? group.losses[i] : "",
        group.status[i],
      ]),
    );
  return rows;
}

const COLUMNS = [
  ["steps", "The planned length of the schedule."],
  ["n", "Runs; every started one counts."],
  [
    "val loss at the end, sd",
    "Mean and standard deviation over seeds. Compare them only between schedules of one length.",
  ],
  ["p below target", "One-sided t-test: is the mean below the target?"],
  ["gate", "The public benchmark's rule for a record: (target − mean) √n, and whether it is at least 0.004."],
  ["reached", "Runs that met the target."],
  [
    "steps, seconds to target",
    "Mean over runs, interpolated between two validations. Brackets are 95 % intervals. " +
      "“>”: a lower bound, of runs that did not arrive.",
  ],
  ["ms/step, of it optimizer", "Milliseconds of a step, and the optimizer's part."],
  ["p (Holm)", "p corrected for the number of pairs. The verdict is “supported” below 0.05."],
];

function makeStatistics(section, task) {
  const table = ({ header, rows }, name, title) => [
    makeTable(header, rows, title),
    make(
      "p",
      { class: "hint" },
      makeCsvButtons(name, () => [header, ...rows]),
    ),
  ];
  section.replaceChildren(
    make("h2", {}, "Statistics"),
    ...table(task.table, "table", "optimizers"),
    ...(task.pairs.rows.length ? [make("h3", {}, "Tests of pairs"), ...table(task.pairs, "pairs", "pairs")] : []),
    make("ul", {}, ...task.remarks.map((line) => make("li", {}, line))),
    make(
      "details",
      {},
      make("summary", {}, "What the columns mean"),
      make("dl", {}, ...COLUMNS.flatMap(([name, meaning]) => [make("dt", {}, name), make("dd", {}, meaning)])),
    ),
  );
}

const PARTS = {
  timed: "training steps (timed)",
  import_s: "import",
  setup_s: "set-up",
  warmup_s: "warm-up",
  val_s: "validation",
  checkpoint_s: "checkpoints",
  end_s: "end",
};
const PART_COLORS = ["#0072B2", "#999999", "#56B4E9", "#F0E442", "#E69F00", "#CC79A7", "#009E73"];

function makeTimes(section, task) {
  const groups = task.numbers.groups
    .map((group, index) => ({ group, index }))
    .filter(({ group }) => group.step_ms !== null);
  section.hidden = !groups.length;
  const kinds = [...new Set(groups.flatMap(({ group }) => Object.keys(group.mean_seconds)))];
  const longest = Math.max(...groups.map(({ group }) => group.step_ms));
  const total = (group) => Object.values(group.mean_seconds).reduce((a, b) => a + b, 0);
  const longestRun = Math.max(...groups.map(({ group }) => total(group)));
  const bar = (parts, whole) =>
    make(
      "div",
      { class: "bar", "aria-hidden": "true" },
      ...parts.map(([value, color]) => {
        const part = make("i", {});
        part.style.width = `${(100 * value) / whole}%`;
        part.style.background = color;
        return part;
      }),
    );
  const key = (color, text) => {
    const mark = make("i", { "aria-hidden": "true" });
    mark.style.background = color;
    return make("span", { class: "key" }, mark, text);
  };
  const color = (place) => PART_COLORS[place % PART_COLORS.length];
  const row = (group, bars, ...numbers) =>
    make(
      "div",
      { class: "time" },
      make("span", { class: "name" }, group.label),
      make("span", { class: "value" }, ...numbers),
      bars,
    );
  section.replaceChildren(
    make("h2", {}, "Where time goes"),
    make(
      "div",
      { class: "two" },
      make(
        "div",
        { class: "panel" },
        make("h3", {}, "A step"),
        make("p", { class: "keys" }, key(color(0), "forward and backward"), key(color(4), "optimizer")),
        ...folded(
          groups.map(({ group, index }) =>
            row(
              group,
              bar(
                [
                  [group.step_ms - (group.optimizer_ms || 0), color(0)],
                  [group.optimizer_ms || 0, color(4)],
                ],
                longest,
              ),
              statistic(task, `groups.${index}.step_ms`, 1),
              " ms, of it ",
              statistic(task, `groups.${index}.optimizer_ms`, 1),
            ),
          ),
        ),
      ),
      make(
        "div",
        { class: "panel" },
        make("h3", {}, "A run"),
        make("p", { class: "keys" }, ...kinds.map((kind, place) => key(color(place), PARTS[kind] || kind))),
        ...folded(
          groups.map(({ group, index }) =>
            row(
              group,
              bar(
                kinds.map((kind, place) => [group.mean_seconds[kind] || 0, color(place)]),
                longestRun,
              ),
              statistic(task, `groups.${index}.mean_seconds.timed`, 1),
              " s timed",
            ),
          ),
        ),
      ),
    ),
    make(
      "details",
      {},
      make("summary", {}, "Seconds of a run, in numbers"),
      makeTable(
        ["optimizer", ...kinds.map((kind) => PARTS[kind] || kind)],
        groups.map(({ group, index }) => [
          group.label,
          ...kinds.map((kind) => statistic(task, `groups.${index}.mean_seconds.${kind}`, 2)),
        ]),
        "seconds of a run",
      ),
    ),
  );
}
