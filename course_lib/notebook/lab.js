// The front end of every lab: controls above, picture, then the sentence that says the same.
// Real form elements only, so that a keyboard and a screen reader work without more code.

const el = (tag, props = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
};

// The controls' values on their way to the kernel. At most one request is under way: the newest
// values wait until the kernel has drawn the last, so that fast dragging never queues up.
const store = (model) => {
  let waiting = null;
  let busy = false;
  const newest = () => waiting ?? model.get("values");
  const send = () => {
    if (busy || waiting === null) return;
    busy = true;
    model.set("values", waiting);
    waiting = null;
    model.save_changes();
  };
  model.on("change:done", () => {
    busy = false;
    send();
  });
  return {
    get: (name) => newest()[name],
    set: (name, value) => {
      const values = { ...newest(), [name]: value };
      if (JSON.stringify(values) === JSON.stringify(newest())) return;
      waiting = values;
      send();
    },
  };
};

const slider = (control, get, set, id) => {
  const input = el("input", { type: "range", min: 0, max: control.values.length - 1, step: 1, id });
  const output = el("output", { htmlFor: id });
  const refresh = () => {
    input.value = control.values.indexOf(get());
    output.textContent = `${get()}${control.unit}`;
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => {
    const value = control.values[Number(input.value)];
    output.textContent = `${value}${control.unit}`;
    input.setAttribute("aria-valuetext", output.textContent);
    set(value);
  });
  return { nodes: [input, output], refresh };
};

const choice = (control, get, set, id) => {
  const select = el("select", { id });
  select.append(...control.options.map((option) => el("option", { value: option, textContent: option })));
  select.addEventListener("change", () => set(select.value));
  return { nodes: [select], refresh: () => (select.value = get()) };
};

const toggle = (control, get, set, id) => {
  const input = el("input", { type: "checkbox", id });
  input.addEventListener("change", () => set(input.checked));
  return { nodes: [input], refresh: () => (input.checked = get()) };
};

const numbers = (control, get, set, id) => {
  const input = el("input", { type: "text", id, className: "course-lab-numbers" });
  const cards = el("span", { className: "course-lab-cards" });
  const note = el("span", { className: "course-lab-note" });
  let dragged = null;
  input.addEventListener("change", () => {
    const words = input.value.split(/[\s,;]+/).filter(Boolean);
    const values = words.map(Number);
    const bad = words.find((word) => !Number.isFinite(Number(word)));
    if (bad !== undefined) note.textContent = `“${bad}” is not a number.`;
    else if (values.length < 1 || values.length > control.most)
      note.textContent = `Give 1 to ${control.most} numbers.`;
    else {
      note.textContent = "";
      set(values);
    }
  });
  const move = (from, to) => {
    const values = [...get()];
    if (to < 0 || to >= values.length || from === to) return;
    values.splice(to, 0, ...values.splice(from, 1));
    set(values);
  };
  const refresh = () => {
    const focus = [...cards.children].indexOf(document.activeElement);
    if (document.activeElement !== input) input.value = get().join(", ");
    cards.replaceChildren(
      ...get().map((value, index) => {
        const card = el("button", { type: "button", draggable: true, textContent: value });
        card.setAttribute("aria-label", `${value}, position ${index + 1}; arrow keys move it`);
        card.addEventListener("dragstart", () => (dragged = index));
        card.addEventListener("dragover", (event) => event.preventDefault());
        card.addEventListener("drop", () => move(dragged, index));
        card.addEventListener("keydown", (event) => {
          const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
          if (!step) return;
          event.preventDefault();
          event.stopPropagation();
          move(index, index + step);
          cards.children[Math.max(0, Math.min(index + step, get().length - 1))]?.focus();
        });
        return card;
      }),
    );
    if (focus >= 0) cards.children[focus]?.focus();
  };
  return { nodes: [input, cards, note], refresh };
};

const steps = (control, get, set, id, model, stop) => {
  const input = el("input", { type: "range", min: 0, step: 1, id });
  const output = el("output", { htmlFor: id });
  const last = () => model.get("steps") - 1;
  const at = () => Math.min(get(), last());
  const button = (text, label, action) => {
    const node = el("button", { type: "button", textContent: text, title: label });
    node.setAttribute("aria-label", label);
    node.addEventListener("click", action);
    return node;
  };
  let timer = null;
  const play = button("▶", "Play", () => {
    if (timer) return pause();
    if (at() >= last()) set(0);
    timer = setInterval(() => (at() >= last() ? pause() : set(at() + 1)), 450);
    play.textContent = "❚❚";
    play.setAttribute("aria-label", "Pause");
  });
  const pause = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "▶";
    play.setAttribute("aria-label", "Play");
  };
  stop.push(pause);
  input.addEventListener("input", () => set(Number(input.value)));
  const refresh = () => {
    input.max = last();
    input.value = at();
    output.textContent = `${at() + 1} of ${last() + 1}`;
  };
  model.on("change:steps", refresh);
  const back = button("◀", "One step back", () => set(Math.max(0, at() - 1)));
  const forward = button("▶|", "One step forward", () => set(Math.min(last(), at() + 1)));
  return { nodes: [back, play, forward, input, output], refresh };
};

const KINDS = { slider, choice, toggle, numbers, steps };
let count = 0;

export default {
  render({ model, el: root }) {
    const spec = model.get("spec");
    const values = store(model);
    const stop = [];
    const form = el("div", { className: "course-lab-controls" });
    const parts = spec.controls.map((control) => {
      const id = `course-lab-${++count}`;
      const get = () => values.get(control.name);
      const set = (value) => values.set(control.name, value);
      const part = KINDS[control.kind](control, get, set, id, model, stop);
      const label = el("label", { htmlFor: id, textContent: control.label });
      const row = el("div", { className: `course-lab-control course-lab-${control.kind}` });
      row.dataset.control = control.name;
      row.append(label, ...part.nodes);
      form.append(row);
      return part;
    });

    const picture = el("div", { className: "course-lab-picture" });
    const sentence = el("p", { className: "course-lab-sentence" });
    sentence.setAttribute("aria-live", "polite");
    const error = el("p", { className: "course-lab-error" });
    error.setAttribute("role", "alert");
    const insight = el("details", { className: "course-lab-insight" });
    insight.append(el("summary", { textContent: "What to take away" }), el("p", { textContent: spec.insight }));

    const draw = () => {
      picture.innerHTML = model.get("picture");
      sentence.textContent = model.get("sentence");
      error.textContent = model.get("error");
      error.hidden = !model.get("error");
    };
    const refresh = () => parts.forEach((part) => part.refresh());
    model.on("change:done", () => {
      draw();
      refresh();
    });

    const box = el("section", { className: "course-lab" });
    box.setAttribute("aria-label", `Lab: ${spec.title}`);
    box.dataset.lab = spec.name;
    box.append(
      el("h4", { textContent: spec.title }),
      el("p", { className: "course-lab-task", textContent: spec.task }),
      form,
      picture,
      sentence,
      error,
      insight,
    );
    root.append(box);
    draw();
    refresh();
    return () => stop.forEach((each) => each());
  },
};
