"use strict";
// What the reader has chosen. It is in the address after the #, so that a link shows what its sender saw.

const DEFAULTS = {
  task: "0",
  x: "steps",
  log: "",
  hide: "",
  view: "overview",
  zoom: "",
  measure: "",
  knob: "",
  runs: "",
};
const state = {};

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const [key, value] of Object.entries(DEFAULTS)) state[key] = given.get(key) ?? value;
  if (!data.tasks[Number(state.task)]) state.task = "0";
  state.off = new Set(given.getAll("off"));
  state.seedsOff = new Set(given.getAll("seedoff"));
}

function saveState() {
  const chosen = new URLSearchParams();
  for (const [key, value] of Object.entries(DEFAULTS)) if (state[key] !== value) chosen.set(key, state[key]);
  for (const label of state.off) chosen.append("off", label);
  for (const seed of state.seedsOff) chosen.append("seedoff", seed);
  history.replaceState(null, "", `#${chosen}`);
}

// Letters in one value, each of which is something that can be on or off.
function setLetter(key, letter, isOn) {
  state[key] = state[key].replaceAll(letter, "") + (isOn ? letter : "");
}

function setMember(set, member, isIn) {
  if (isIn) set.add(member);
  else set.delete(member);
}

// Four numbers, or null.
function zoomOf(text) {
  const [left, right, bottom, top] = text.split(",").map(Number);
  return left < right && bottom < top ? { x: [left, right], y: [bottom, top] } : null;
}
