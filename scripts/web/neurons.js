"use strict";
// Neurons over training: a map of layer against step for each optimizer, all on one scale.

// Cividis, which readers of any colour vision see alike.
const CIVIDIS = [
  [0, 34, 78],
  [18, 53, 112],
  [59, 73, 108],
  [87, 93, 109],
  [112, 113, 115],
  [138, 134, 120],
  [165, 156, 116],
  [195, 179, 105],
  [225, 204, 85],
  [254, 232, 56],
];

function heat(part) {
  const place = Math.min(Math.max(part, 0), 1) * (CIVIDIS.length - 1);
  const [low, high] = [CIVIDIS[Math.floor(place)], CIVIDIS[Math.ceil(place)]];
  return `rgb(${low.map((value, i) => Math.round(value + (high[i] - value) * (place % 1))).join(" ")})`;
}

function makeNeurons(section, task) {
  const keys = Object.keys(task.neurons);
  section.hidden = !keys.length;
  if (!keys.length) return section.replaceChildren();
  const chosen = keys.includes(state.measure) ? state.measure : keys[0];
  const { meaning, title, groups } = task.neurons[chosen];
  const labels = labelsOf(task);
  const highest = Math.max(...groups.flatMap(({ values }) => values.flat()), 1e-9);
  const readout = make("p", { class: "readout", "aria-live": "polite" }, "Point at a cell to read its value.");
  const digits = highest >= 10 ? 1 : 3;
  const select = makeSelect(
    "Measure",
    keys.map((key) => [key, task.neurons[key].title]),
    chosen,
    (key) => {
      state.measure = key;
      saveState();
      makeNeurons(section, task);
      section.querySelector("select").focus();
    },
  );
  const layers = Math.max(...groups.map(({ values }) => values.length));
  const lastRows = [...Array(layers).keys()].map((layer) => [
    `layer ${layer}`,
    ...groups.map(({ values }) => (values[layer] ? fixed(values[layer].at(-1), digits) : "–")),
  ]);
  section.replaceChildren(
    make("h2", {}, "Neurons"),
    make("div", { class: "controls" }, select, makeScale(highest, digits)),
    make("p", { class: "hint" }, meaning, " Means over seeds."),
    make(
      "div",
      { class: "maps" },
      ...groups.map((map) =>
        makeMap(
          labels[map.group],
          map,
          highest,
          (layer, i) =>
            (readout.textContent =
              `${labels[map.group]}, layer ${layer}, step ${whole(map.steps[i])}: ` +
              `${fixed(map.values[layer][i], digits)} ${title}`),
        ),
      ),
    ),
    readout,
    make(
      "details",
      {},
      make("summary", {}, "At the last measured step, in numbers"),
      makeTable(["", ...groups.map(({ group }) => labels[group])], lastRows, `${title} at the last step`),
    ),
  );
}

function makeMap(label, { steps, values, runs }, highest, tell) {
  const [width, height] = [steps.length, values.length];
  const map = makeSvg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    preserveAspectRatio: "none",
    class: "map",
    role: "img",
    "aria-label": `${label}, layers by steps`,
  });
  values.forEach((row, layer) =>
    row.forEach((value, i) =>
      map.append(
        makeSvg("rect", {
          x: i,
          y: height - 1 - layer,
          width: 1.02,
          height: 1.02,
          fill: heat(value / highest),
          onpointerenter: () => tell(layer, i),
        }),
      ),
    ),
  );
  return make(
    "figure",
    {},
    make("figcaption", {}, make("span", { class: "name" }, label), ` (n = ${runs})`),
    make(
      "div",
      { class: "mapped" },
      make("span", { class: "layers" }, make("span", {}, `layer ${height - 1}`), make("span", {}, "0")),
      map,
    ),
    make(
      "div",
      { class: "steps" },
      make("span", {}, `step ${whole(steps[0])}`),
      make("span", {}, steps.length > 1 ? whole(steps.at(-1)) : ""),
    ),
  );
}

function makeScale(highest, digits) {
  const strip = make(
    "span",
    { class: "strip" },
    ...[...Array(24).keys()].map((i) => {
      const part = make("i", {});
      part.style.background = heat(i / 23);
      return part;
    }),
  );
  return make("span", { class: "heat" }, "0", strip, fixed(highest, digits));
}
