// A card of questions. Each is a form of its own: choose or type, then press the button or Enter.

const el = (tag, props = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
};

let count = 0;

const choices = (question, name) => {
  const group = el("div", { className: "course-options" });
  for (const [letter, html] of question.choices) {
    const input = el("input", { type: "radio", name, value: letter });
    group.append(el("label", {}, input, el("span", { innerHTML: `<b>${letter})</b> ${html}` })));
  }
  return { node: group, value: () => group.querySelector(":checked")?.value ?? "" };
};

const number = (question, labelledBy) => {
  const input = el("input", { type: "text", inputMode: "decimal", autocomplete: "off" });
  input.setAttribute("aria-labelledby", labelledBy);
  return { node: el("span", {}, input, ` ${question.unit}`), value: () => input.value };
};

const form = (model, question, index) => {
  const id = `course-question-${(count += 1)}`;
  const prompt = el("div", { id, innerHTML: question.prompt });
  const answer = question.choices.length ? choices(question, id) : number(question, id);
  const button = el("button", { type: "submit", textContent: model.get("spec").verb });
  const reply = el("div", { className: "course-reply" });
  reply.setAttribute("role", "status");
  const node = el("form", { className: "course-question" }, prompt, answer.node, " ", button, reply);
  node.setAttribute("role", "group");
  node.setAttribute("aria-labelledby", id);
  node.addEventListener("keydown", (event) => {
    // JupyterLab keeps Enter from reaching the form.
    if (event.key === "Enter" && event.target !== button) {
      event.preventDefault();
      node.requestSubmit();
    }
  });
  node.addEventListener("submit", (event) => {
    event.preventDefault();
    model.send({ index, value: answer.value() });
  });
  const refresh = () => {
    reply.innerHTML = model.get("replies")[index];
  };
  return { node, refresh };
};

const render = ({ model, el: root }) => {
  const spec = model.get("spec");
  const forms = spec.questions.map((question, index) => form(model, question, index));
  const word = el("span", { className: "course-word", textContent: spec.title });
  const card = el("section", { className: `course-card course-${spec.kind} course-live` });
  card.append(el("header", {}, word), ...forms.map((each) => each.node));
  // JupyterLab's shortcuts take the arrow keys away from any control that does not say this itself.
  for (const control of card.querySelectorAll("input, button")) {
    control.setAttribute("data-lm-suppress-shortcuts", "true");
  }
  root.append(card);
  const refresh = () => forms.forEach((each) => each.refresh());
  model.on("change:replies", refresh);
  refresh();
  return () => model.off("change:replies", refresh);
};

export default { render };
