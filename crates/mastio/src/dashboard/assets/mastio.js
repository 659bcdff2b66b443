// Copying, times in the viewer's zone, and parts of pages that move. Pages read and act without it.
(() => {
  "use strict";
  const local = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

  function dress(root) {
    for (const time of root.querySelectorAll("time[datetime]:not([title])")) {
      const at = new Date(time.dateTime);
      if (Number.isNaN(at.getTime())) continue;
      time.title = time.textContent;
      time.textContent = local.format(at);
    }
    for (const code of root.querySelectorAll("[data-copy]:not([role])")) {
      code.setAttribute("role", "button");
      code.setAttribute("tabindex", "0");
      code.title = "Copy " + code.dataset.copy;
    }
  }

  async function copy(code) {
    await navigator.clipboard.writeText(code.dataset.copy);
    code.classList.add("copied");
    setTimeout(() => code.classList.remove("copied"), 1200);
  }

  document.addEventListener("click", (event) => {
    const code = event.target.closest("[data-copy]");
    if (code) copy(code);
  });
  document.addEventListener("keydown", (event) => {
    if ((event.key === "Enter" || event.key === " ") && event.target.matches("[data-copy]")) {
      event.preventDefault();
      copy(event.target);
    }
  });
  // A part that names a stream hears `moved` when the server has said something, at most five times a second.
  const streams = [];
  for (const part of document.querySelectorAll("[data-stream]")) {
    const stream = new EventSource(part.dataset.stream);
    let due = null;
    const moved = () => {
      due ??= setTimeout(() => {
        due = null;
        part.dispatchEvent(new CustomEvent("moved"));
      }, 200);
    };
    stream.addEventListener("message", moved);
    for (const name of (part.dataset.events || "").split(" ").filter(Boolean)) stream.addEventListener(name, moved);
    streams.push(stream);
  }
  addEventListener("pagehide", () => streams.forEach((stream) => stream.close()));

  document.addEventListener("htmx:afterSettle", () => dress(document));
  dress(document);
})();
