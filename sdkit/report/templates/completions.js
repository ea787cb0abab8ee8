"use strict";
// The browsers of held-out prompts and of rollouts.  Every text is set as text, never as HTML.
const LEVELS = [
  [0.1, "transparent", "inherit"], [0.5, "#fee8a0", "#222"], [1, "#fdae61", "#222"], [2, "#f46d43", "#111"], [Infinity, "#a50026", "#fff"],
];  // nats: a token's colours by the size of its divergence, as in `sdkit rollouts`

function select(label, options, change) {
  const node = element("select", {});
  options.forEach(([value, text]) => node.append(element("option", { value, textContent: text })));
  node.addEventListener("change", change);
  return [node, element("label", { textContent: label + " ", hidden: options.length < 2 }, node)];
}

function card(heading, ...texts) {
  const head = element("div", { className: "head" });
  heading.forEach((part, i) => head.append(element(i ? "span" : "b", { textContent: part })));
  return element("div", { className: "card" }, head, ...texts);
}

function textBlock(text, label, className = "") {
  const node = element("div", { className: `text ${className}` });
  if (label) node.append(element("span", { className: "label", textContent: label }));
  node.append(text);
  return node;
}

// A part of a trajectory: what the student sampled in a turn, or what it was shown after one.
function partBlock(part, text) {
  const reward = part.reward === undefined || part.reward === null ? "" : ` · reward ${figure(part.reward)}`;
  return textBlock(text, `turn ${part.turn} · ${part.role}${reward}`, part.role === "assistant" ? "" : "observation");
}

function figure(value) {
  return value === null ? "–" : String(Number(value.toPrecision(3)));
}

function scoreParts(scores) {
  return Object.entries(scores).map(([name, value]) => `${name} ${figure(value)}`);
}

// The number of characters before the first word in which the texts differ.
function sharedStart(texts) {
  let length = Math.min(...texts.map((text) => text.length));
  for (const text of texts) while (text.slice(0, length) !== texts[0].slice(0, length)) length -= 1;
  return texts.length > 1 ? texts[0].slice(0, length).search(/\S*$/) : 0;
}

function excerpt(text, start) {
  return (start ? "… " : "") + text.slice(start, start + 200).trim();
}

// ---- held-out prompts

function heldOut() {
  let showTeacher = false;
  const controls = document.getElementById("held-out-controls");
  const runs = report.completions.filter((run) => run.held_out.length);
  if (!runs.length) {
    document.querySelector("#held-out .browser").replaceChildren(element("p", { textContent: "No held-out completions are on record." }));
    return;
  }
  const state = { run: runs[0], suite: runs[0].held_out[0], prompt: 0 };
  const [runSelect, runLabel] = select("run", runs.map((run, i) => [i, run.name]), () => {
    state.run = runs[runSelect.value];
    fillSuites();
  });
  const [suiteSelect, suiteLabel] = select("suite", [], () => chooseSuite());
  suiteLabel.hidden = false;
  const [filterSelect, filterLabel] = select("show", [
    ["all", "all prompts"], ["better", "better at the end"], ["worse", "worse at the end"], ["changing", "changing score"],
  ], () => list());
  const said = element("span", { className: "note" });
  controls.append(runLabel, suiteLabel, filterLabel, said);

  function fillSuites() {
    suiteSelect.replaceChildren(...state.run.held_out.map((part, i) => element("option", { value: i, textContent: `${part.suite}, ${part.decoding}` })));
    chooseSuite();
  }
  function chooseSuite() {
    state.suite = state.run.held_out[suiteSelect.value];
    list();
  }
  function matches(prompt) {
    const known = prompt.means.filter((mean) => mean !== null);
    const change = known.at(-1) - known[0];
    return { all: true, better: change > 0, worse: change < 0, changing: new Set(known).size > 1 }[filterSelect.value];
  }
  function list() {
    const part = state.suite;
    const shown = part.prompts.filter(matches);
    const evaluations = part.steps.length < part.all_evaluations ? `, ${part.steps.length} of ${part.all_evaluations} evaluations` : "";
    const sampled = part.prompts.length < part.all_prompts ? ` (a sample of ${part.prompts.length} of ${part.all_prompts} prompts is in this page)` : "";
    said.textContent = `${shown.length} prompts${sampled}${evaluations}`;
    const start = sharedStart(part.prompts.map((prompt) => report.texts[prompt.prompt]));
    document.getElementById("prompts").replaceChildren(...shown.map((prompt, i) => {
      const means = prompt.means.map(figure);
      const trail = means.length > 6 ? [...means.slice(0, 3), "…", ...means.slice(-2)] : means;
      const button = element("button", { type: "button" },
        element("span", { className: "words", textContent: excerpt(report.texts[prompt.prompt], start) }),
        element("small", { textContent: `row ${prompt.row} · ${part.main} ${trail.join(" → ")}` }));
      button.addEventListener("click", () => show(shown, i));
      return element("li", {}, button);
    }));
    if (shown.length) show(shown, 0);
    else document.getElementById("prompt").replaceChildren(element("p", { className: "note", textContent: "No prompt is like that." }));
  }
  function show(shown, place) {
    document.querySelectorAll("#prompts li").forEach((item, i) => item.setAttribute("aria-current", i === place));
    const prompt = shown[place], part = state.suite;
    const cards = [card([`prompt of row ${prompt.row}`, "the student's; evaluations sample from it alone"], textBlock(report.texts[prompt.prompt]))];
    if (prompt.teacher_prompt !== null) {
      const seen = element("details", { open: showTeacher }, element("summary", { textContent: "what the teacher sees of it" }), textBlock(report.texts[prompt.teacher_prompt], "", "dim"));
      seen.addEventListener("toggle", () => { showTeacher = seen.open; });
      cards.push(seen);
    }
    let before = null;
    prompt.samples.forEach((samples, i) => {
      const same = before !== null && samples.length === 1 && samples[0].text === before;
      samples.forEach((sample, n) => {
        const which = part.all_samples > 1 ? `sample ${n + 1} of ${part.all_samples}` : "";
        const bodies = same ? [textBlock("the same completion", "", "dim")]
          : sample.turns.length ? sample.turns.map((part) => partBlock(part, report.texts[part.text] || "(empty)"))
          : [textBlock(report.texts[sample.text] || "(empty)")];
        const ending = sample.ending ? `ending ${sample.ending}` : "";
        const feedback = Object.entries(sample.feedback).map(([name, text]) => textBlock(text, `feedback of ${name}`, "dim"));
        cards.push(card([part.steps[i] ? `after step ${part.steps[i]}` : "before training", ending, ...scoreParts(sample.scores), which].filter(Boolean), ...bodies, ...feedback));
      });
      before = samples.length === 1 ? samples[0].text : null;
    });
    document.getElementById("prompt").replaceChildren(...cards);
  }
  fillSuites();
}

// ---- rollouts

// The blocks of a rollout: one, or one for each part of a trajectory.
function tokens(rollout) {
  if (!rollout.turns.length) return [fill(textBlock("", ""), rollout, 0, rollout.pieces.length)];
  let start = 0;
  return rollout.turns.map((part) => {
    start += part.pieces;
    return fill(partBlock(part, ""), rollout, start - part.pieces, start, part.role !== "assistant");
  });
}

function fill(node, rollout, start, end, plain = false) {
  const pieces = rollout.pieces.slice(start, end);
  if (plain || !rollout.divergence) {
    node.append(pieces.join(""));
    return node;
  }
  pieces.forEach((piece, i) => {
    const value = rollout.divergence[start + i];
    const token = element("span", { className: value === null ? "token dim" : "token", textContent: piece });
    if (value !== null) {
      const [, background, colour] = LEVELS.find(([bound]) => Math.abs(value) < bound);
      token.style.background = background;
      token.style.color = colour;
      token.title = `${value} nats`;
    } else token.title = "no loss counts this token";
    node.append(token);
  });
  return node;
}

function legend() {
  const node = document.getElementById("legend");
  node.hidden = false;
  node.replaceChildren("divergence of teacher and student at each token, nats: ");
  let below = 0;
  LEVELS.forEach(([bound, background, colour]) => {
    const label = element("span", { textContent: bound === Infinity ? `above ${below}` : `${below} to ${bound}` });
    label.style.background = background;
    label.style.color = colour;
    node.append(label, " ");
    below = bound;
  });
}

function rollouts() {
  const controls = document.getElementById("rollouts-controls");
  const target = document.getElementById("rollouts-list");
  const runs = report.completions;
  let run = runs[0];
  const [runSelect, runLabel] = select("run", runs.map((one, i) => [i, one.name]), () => choose());
  const slider = element("input", { type: "range", min: 0, ariaLabel: "step" });
  const name = element("b", {});
  const prompts = element("input", { type: "checkbox", id: "show-prompts" });
  const said = element("span", { className: "note" });
  controls.append(runLabel, element("label", { textContent: "step " }, slider, " ", name), element("label", {}, prompts, " prompts of student and teacher"), said);
  slider.addEventListener("input", show);
  prompts.addEventListener("change", show);

  function choose() {
    run = runs[runSelect.value];
    const steps = run.rollouts.steps;
    slider.max = Math.max(0, steps.length - 1);
    slider.value = slider.max;
    show();
  }
  function show() {
    const recorded = run.rollouts;
    if (recorded.problem) {
      name.textContent = said.textContent = "";
      target.replaceChildren(element("p", { textContent: recorded.problem + "." }));
      return;
    }
    const step = recorded.steps[slider.value];
    name.textContent = step.step;
    const some = recorded.steps.length < recorded.all_steps ? `; ${recorded.steps.length} of ${recorded.all_steps} steps are in this page` : "";
    said.textContent = `${step.rollouts.length} of ${step.all_rollouts} rollouts of this step${some}`;
    target.replaceChildren(...step.rollouts.map((rollout) => {
      const known = (rollout.divergence || []).filter((value) => value !== null);
      const mean = known.length ? `${figure(known.reduce((a, b) => a + b) / known.length)} nats a token` : "";
      const length = `${rollout.tokens} tokens` + (rollout.finished ? "" : ", cut");
      const ending = rollout.ending ? `ending ${rollout.ending}` : "";
      const heading = [`row ${rollout.row}`, `group ${rollout.group}`, length, ending, ...scoreParts(rollout.scores), mean].filter(Boolean);
      const sides = prompts.checked ? promptBlocks(rollout) : [];
      return card(heading, ...sides, ...tokens(rollout));
    }));
  }
  function promptBlocks(rollout) {
    return [["prompt", "student's prompt"], ["teacher_prompt", "teacher's prompt"]]
      .filter(([field]) => rollout[field] !== null)
      .map(([field, label]) => textBlock(report.texts[rollout[field]], label, "dim"));
  }
  if (runs.some((one) => one.rollouts.steps.some((step) => step.rollouts.some((rollout) => rollout.divergence)))) legend();
  choose();
}

heldOut();
rollouts();
