// Puts sliders above a picture, and shows the parts that belong to the chosen places.
(() => {
  const root = document.currentScript.closest(".choices");
  const data = JSON.parse(root.querySelector("[type='application/json']").textContent);
  const picture = root.querySelector(".picture");
  const parts = [...picture.querySelectorAll("g[id^='shown-']")].map((part) =>
    [part, part.id.split("-")[1].split("_")]);
  const make = (name, attributes, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const state = make("p", { "aria-live": "polite" });
  const sliders = data.values.map((values, i) => make("input", {
    type: "range", min: 0, max: values.length - 1, value: data.start[i],
  }));
  const values = sliders.map(() => make("b", { "aria-hidden": "true" }));
  const show = () => {
    const places = sliders.map((slider) => Number(slider.value));
    places.forEach((place, i) => {
      values[i].textContent = data.values[i][place];
      sliders[i].setAttribute("aria-valuetext", data.values[i][place]);
    });
    for (const [part, needed] of parts) {
      const seen = needed.every((place, i) => place === "" || Number(place) === places[i]);
      part.style.display = seen ? "" : "none";
    }
    state.textContent = data.sentences[places];
    picture.ariaLabel = state.textContent;
  };
  const fields = sliders.map((slider, i) =>
    make("label", {}, `${data.labels[i]}: `, values[i], slider));
  for (const slider of sliders) slider.addEventListener("input", show);
  picture.before(make("div", { class: "controls" }, ...fields), state);
  show();
})();
