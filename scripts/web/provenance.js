"use strict";
// Where the runs come from: records, whether they verify, and what tells two of them apart.

function makeProvenance(section, task) {
  const labels = labelsOf(task);
  const name = (run) => `${labels[run.group]}, seed ${run.seed}, ${run.name}`;
  const words = new Map();
  for (const run of task.runs) words.set(run.verdict, (words.get(run.verdict) || 0) + 1);
  const summary = [...words].map(([word, count]) => `${count} ${word || "not verified while runs go on"}`).join(", ");
  const codes = [...new Set(task.runs.map((run) => run.code))];
  const flawed = task.runs.filter((run) => run.reasons.length);
  const rows = task.runs.map((run) => [
    labels[run.group],
    run.seed,
    run.status,
    run.verdict || "–",
    run.code || "–",
    make("a", { href: run.link }, run.name),
  ]);
  const [a, b] = chosenRuns(task);
  const options = task.runs.map((run, i) => [String(i), name(run)]);
  const choose = (place) => (value) => {
    const pair = chosenRuns(task);
    pair[place] = Number(value);
    state.runs = pair.join(",");
    saveState();
    makeProvenance(section, task);
    section.querySelectorAll("select")[place].focus();
  };
  const open = [...section.querySelectorAll("details")].map((details) => details.open);
  section.replaceChildren(
    make("h2", {}, "Provenance"),
    make(
      "p",
      {},
      `Records: ${summary}. Code: ${codes.map((code) => code || "unknown").join(", ")}. `,
      make(
        "span",
        { class: "hint" },
        "A consistent record can still be invented; seeds of your own show that it is not.",
      ),
    ),
    ...(flawed.length
      ? [
          make(
            "details",
            {},
            make("summary", {}, `Notes on ${flawed.length} records`),
            make(
              "ul",
              {},
              ...flawed.map((run) => make("li", {}, `${run.name}: ${run.verdict}. ${run.reasons.join("; ")}`)),
            ),
          ),
        ]
      : []),
    make(
      "details",
      {},
      make("summary", {}, `Runs and raw records (${rows.length})`),
      makeTable(["optimizer", "seed", "status", "verified", "code", "record"], rows, "runs"),
      make(
        "p",
        { class: "hint" },
        "Links lead from where this file was written. ",
        makeCsvButtons("runs", () => [
          ["optimizer", "seed", "status", "verified", "code", "record"],
          ...task.runs.map((run) => [labels[run.group], run.seed, run.status, run.verdict, run.code, run.link]),
        ]),
      ),
    ),
    make(
      "details",
      {},
      make("summary", {}, "What tells two runs apart"),
      make(
        "div",
        { class: "controls" },
        makeSelect("A", options, String(a), choose(0)),
        makeSelect("B", options, String(b), choose(1)),
      ),
      makeDifference(task, a, b),
    ),
    make(
      "details",
      {},
      make("summary", {}, "What all runs have in common"),
      makeTable(["key", "value"], Object.entries(task.provenance.common), "common settings"),
    ),
  );
  section.querySelectorAll("details").forEach((details, i) => (details.open = open[i] || false));
}

// By default the first runs of the first two rows.
function chosenRuns(task) {
  const [a, b] = state.runs.split(",").map(Number);
  if (state.runs && task.runs[a] && task.runs[b]) return [a, b];
  const second = task.runs.findIndex((run) => run.group === 1);
  return [0, Math.max(second, Math.min(1, task.runs.length - 1))];
}

function makeDifference(task, a, b) {
  const rows = Object.entries(task.provenance.differing)
    .filter(([, { of }]) => of[a] !== of[b])
    .map(([key, { values, of }]) => [key, ...[of[a], of[b]].map((place) => (place === null ? "–" : values[place]))]);
  return rows.length
    ? makeTable(["key", "A", "B"], rows, "differences")
    : make("p", {}, "Nothing: it is the same run.");
}
