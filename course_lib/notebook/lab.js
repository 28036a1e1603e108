// The front end of every lab: controls above, picture, then the sentence that says the same.
// Real form elements only, so that a keyboard and a screen reader work without more code.

const el = (tag, props = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  // JupyterLab takes the arrow keys from whatever has the focus inside a notebook, unless that
  // very element says no; the same words on an element around it would come too late.
  if (["input", "select", "button", "summary"].includes(tag))
    node.dataset.lmSuppressShortcuts = "true";
  node.append(...children);
  return node;
};

// The controls' values on their way to the kernel. At most one request is under way: the newest
// values wait until the kernel has drawn the last, so that fast dragging never queues up.
const store = (model, onLate) => {
  let waiting = null;
  let busy = false;
  let late = null;
  const newest = () => waiting ?? model.get("values");
  const send = () => {
    if (busy || waiting === null) return;
    busy = true;
    late = setTimeout(() => onLate(true), 4000);
    model.set("values", waiting);
    waiting = null;
    model.save_changes();
  };
  model.on("change:done", () => {
    busy = false;
    clearTimeout(late);
    onLate(false);
    send();
  });
  return {
    busy: () => busy,
    get: (name) => newest()[name],
    set: (name, value) => {
      const values = { ...newest(), [name]: value };
      if (JSON.stringify(values) === JSON.stringify(newest())) return;
      waiting = values;
      send();
    },
  };
};

const slider = ({ control, get, set, id }) => {
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

const choice = ({ control, get, set, id }) => {
  const select = el("select", { id });
  select.append(...control.options.map((option) => el("option", { value: option, textContent: option })));
  select.addEventListener("change", () => set(select.value));
  return { nodes: [select], refresh: () => (select.value = get()) };
};

const toggle = ({ get, set, id }) => {
  const input = el("input", { type: "checkbox", id });
  input.addEventListener("change", () => set(input.checked));
  return { nodes: [input], refresh: () => (input.checked = get()) };
};

const numbers = ({ control, get, set, id }) => {
  const input = el("input", { type: "text", id, className: "course-lab-numbers" });
  const cards = el("span", { className: "course-lab-cards" });
  const note = el("span", { className: "course-lab-note", id: `${id}-note` });
  input.setAttribute("aria-describedby", note.id);
  const complain = (text) => {
    note.textContent = text;
    input.setAttribute("aria-invalid", text !== "");
  };
  let dragged = null;
  let shown = "";
  const take = () => {
    const words = input.value.split(/[\s,;]+/).filter(Boolean);
    const values = words.map(Number);
    const bad = words.find((word) => !Number.isFinite(Number(word)));
    if (bad !== undefined) complain(`“${bad}” is not a number.`);
    else if (values.length < 1 || values.length > control.most)
      complain(`Give 1 to ${control.most} numbers.`);
    else {
      complain("");
      set(values);
    }
  };
  input.addEventListener("change", take);
  input.addEventListener("keydown", (event) => event.key === "Enter" && take());
  const move = (from, to) => {
    const values = [...get()];
    if (to < 0 || to >= values.length || from === to) return;
    values.splice(to, 0, ...values.splice(from, 1));
    set(values);
    refresh();
  };
  const refresh = () => {
    // Built anew only when the numbers change: a card under the hand must not vanish.
    if (JSON.stringify(get()) === shown) return;
    shown = JSON.stringify(get());
    const active = cards.getRootNode().activeElement;
    const focus = [...cards.children].indexOf(active);
    input.value = get().join(", ");
    complain("");
    cards.replaceChildren(
      ...get().map((value, index) => {
        const card = el("button", { type: "button", draggable: true, textContent: value });
        card.setAttribute("aria-label", `${value}, position ${index + 1}; arrow keys move it`);
        card.addEventListener("dragstart", () => (dragged = index));
        card.addEventListener("dragend", () => (dragged = null));
        card.addEventListener("dragover", (event) => event.preventDefault());
        card.addEventListener("drop", (event) => {
          event.preventDefault();
          if (dragged !== null) move(dragged, index);
          dragged = null;
        });
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

const steps = ({ get, set, id, model, stop, busy, playing }) => {
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
    timer = setInterval(() => {
      if (busy()) return;
      if (at() >= last()) pause();
      else set(at() + 1);
    }, 450);
    face("❚❚", "Pause");
    playing(true);
  });
  const face = (text, label) => {
    play.textContent = text;
    play.title = label;
    play.setAttribute("aria-label", label);
  };
  const pause = () => {
    clearInterval(timer);
    timer = null;
    face("▶", "Play");
    playing(false);
  };
  stop.push(pause);
  input.addEventListener("input", () => set(Number(input.value)));
  const refresh = () => {
    input.max = last();
    input.value = at();
    output.textContent = `${at() + 1} of ${last() + 1}`;
    input.setAttribute("aria-valuetext", output.textContent);
  };
  model.on("change:steps", refresh);
  const back = button("◀", "One step back", () => set(Math.max(0, at() - 1)));
  const forward = button("▶|", "One step forward", () => set(Math.min(last(), at() + 1)));
  return { nodes: [back, play, forward, input, output], refresh };
};

const KINDS = { slider, choice, toggle, numbers, steps };
// A widget loads its own copy of this module, so a counter alone would repeat itself on a page.
const page = Math.random().toString(36).slice(2);
let count = 0;

export default {
  render({ model, el: root }) {
    const spec = model.get("spec");
    const late = el("p", {
      className: "course-lab-error",
      hidden: true,
      textContent: "The kernel is busy or was restarted. If this stays, run this cell again.",
    });
    const values = store(model, (isLate) => (late.hidden = !isLate));
    const stop = [];
    const sentence = el("p", { className: "course-lab-sentence" });
    // While it plays, a screen reader would be read every step; it is told the last one.
    const playing = (is) => sentence.setAttribute("aria-live", is ? "off" : "polite");
    playing(false);
    const form = el("div", { className: "course-lab-controls" });
    const parts = spec.controls.map((control) => {
      const id = `course-lab-${page}-${++count}`;
      const get = () => values.get(control.name);
      const set = (value) => values.set(control.name, value);
      const part = KINDS[control.kind]({ control, get, set, id, model, stop, busy: values.busy, playing });
      const label = el("label", { htmlFor: id, textContent: control.label });
      const row = el("div", { className: `course-lab-control course-lab-${control.kind}` });
      row.dataset.control = control.name;
      row.append(label, ...part.nodes);
      form.append(row);
      return part;
    });

    const picture = el("div", { className: "course-lab-picture" });
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
      late,
      insight,
    );
    root.append(box);
    draw();
    refresh();
    return () => stop.forEach((each) => each());
  },
};
