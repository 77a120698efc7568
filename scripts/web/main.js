"use strict";
// The page: its parts in their order, again whenever another task is chosen or the address changes.

const part = (id) => document.getElementById(id);

function makeHeader(task) {
  part("track").replaceChildren(make("strong", {}, task.name), ` · target ${task.numbers.target}`);
  const options = data.tasks.map((other, i) => [
    String(i),
    `${other.name}, target ${other.numbers.target}, ${other.runs.length} runs, ${other.task.slice(0, 8)}`,
  ]);
  part("tasks").replaceChildren(
    ...(options.length > 1
      ? [
          makeSelect("Task", options, state.task, (value) => {
            Object.assign(state, { task: value, zoom: "", runs: "" });
            saveState();
            makePage();
          }),
        ]
      : []),
  );
  document.title = task.title;
}

function makeVerdict(section, task) {
  const count = task.runs.length;
  section.replaceChildren(
    make("h1", {}, task.title),
    make("ul", {}, ...task.lines.map((line) => make("li", {}, line))),
    make("p", { class: "hardware" }, `${count} run${count === 1 ? "" : "s"} on ${task.hardware.join("; ")}`),
    ...data.warnings.map((line) => make("p", { class: "warning" }, line)),
  );
}

function makePage() {
  const task = data.tasks[Number(state.task)];
  makeHeader(task);
  makeVerdict(part("verdict"), task);
  makeCurves(part("curves"), task, () => makeTarget(part("target"), task));
  makeTarget(part("target"), task);
  makeStatistics(part("statistics"), task);
  makeTimes(part("times"), task);
  makeNeurons(part("neurons"), task);
  makeTuning(part("tuning"));
  makeProvenance(part("provenance"), task);
}

// While runs go on the file is written again; a reader who is choosing something is left in peace.
function followRuns() {
  if (!data.refresh_s) return;
  const follow = makeCheck(`Live: written at ${data.written}, looks again every ${data.refresh_s} s`, true, () => {});
  part("live").append(follow);
  setInterval(() => {
    if (follow.querySelector("input").checked && !document.hidden && document.activeElement.tagName !== "SELECT")
      location.reload();
  }, data.refresh_s * 1000);
}

readState();
makePage();
followRuns();
addEventListener("hashchange", () => (readState(), makePage()));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", makePage);
document.documentElement.dataset.ready = "yes";
