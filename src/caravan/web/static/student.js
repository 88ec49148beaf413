// What families do: buy, pay, try again, tell where home is. All through the JSON API; the cookie says who they are.

// No module imports another: a second address of one file would be a second copy of it, and a second socket.
function refresh() {
  document.body.dispatchEvent(new CustomEvent("caravan:feed"));
}

/** One POST or PATCH; throws {code, detail} of the problem that came back. */
async function send(method, address, body, key) {
  const headers = { "content-type": "application/json" };
  if (key) headers["idempotency-key"] = key;
  let answer;
  try {
    answer = await fetch(address, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw { code: "OFFLINE", detail: "The server could not be reached. Nothing was charged; please try again." };
  }
  const document_ = await answer.json().catch(() => ({}));
  if (!answer.ok) throw { code: "REFUSED", detail: "That did not work. Please try again.", ...document_ };
  return document_;
}

/** Run a step while its button waits; tell what went wrong beside it. */
async function step(button, place, work) {
  if (button.getAttribute("aria-busy") === "true") return;
  const form = button.form; // the button may stand in the place that is emptied
  place.replaceChildren();
  button.setAttribute("aria-busy", "true");
  try {
    await work();
  } catch (problem) {
    if (!problem.detail) throw problem;
    place.replaceChildren(describe(problem, form));
  } finally {
    button.setAttribute("aria-busy", "false");
  }
}

function describe(problem, form) {
  const line = document.createElement("span");
  line.textContent = problem.detail;
  if (problem.code === "CHECKOUT_OPEN" && problem.paymentId) {
    line.textContent = `You have begun to buy this course at this time already (${summary(problem, form)}). `;
    const link = document.createElement("a");
    link.href = `/checkout/${encodeURIComponent(problem.paymentId)}`;
    link.textContent = "Go on with that order";
    line.append(link);
    if (form?.matches("[data-buy]")) line.append(orderAgain());
  }
  return line;
}

/** `10 sessions, online, ₹1,200`: which order is open. Modes in the words of the form. */
function summary(open, form) {
  const mode = form?.querySelector(`input[name=learningMode][value="${CSS.escape(open.learningMode ?? "")}"]`);
  const sessions = `${open.sessionCount} session${open.sessionCount === 1 ? "" : "s"}`;
  const words = [sessions, mode?.closest("label").textContent.trim().toLowerCase()];
  if (open.groupSize > 1) words.push(`group of ${open.groupSize}`);
  words.push(money(open.amountCents, open.currency));
  return words.filter(Boolean).join(", ");
}

function money(cents, currency) {
  const digits = cents % 100 ? 2 : 0;
  const format = { style: "currency", currency, minimumFractionDigits: digits, maximumFractionDigits: digits };
  return new Intl.NumberFormat("en-IN", format).format(cents / 100);
}

function orderAgain() {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "secondary outline";
  button.dataset.again = "";
  button.textContent = "Order it again with what I chose now";
  return button;
}

// One key per intent: the same order sent twice is one order, a changed order is another one.
const keys = new Map();
function keyOf(form, body) {
  const intent = JSON.stringify(body);
  if (!keys.has(intent)) keys.set(intent, keys.size === 0 ? form.dataset.key : `${form.dataset.key}-${keys.size}`);
  return keys.get(intent);
}

/** Begin an order, and lead to its page. `more`: what is asked beyond the form's fields. */
async function buy(form, more = {}) {
  const body = { ...order(form), ...more };
  const payment = await send("POST", "/api/v1/payments", body, keyOf(form, body));
  location.assign(`/checkout/${payment.id}`);
}

function order(form) {
  const fields = new FormData(form);
  const tier = form.querySelector("input[name=tier]:checked");
  return {
    studentId: fields.get("studentId"),
    courseId: fields.get("courseId"),
    sessionCount: Number(tier.value),
    groupSize: Number(tier.dataset.groupSize),
    expectedAmountCents: Number(tier.dataset.amountCents),
    learningMode: fields.get("learningMode"),
    timeSlot: fields.get("timeSlot"),
    startDate: fields.get("startDate"),
  };
}

function placeOf(element) {
  return (element.closest("form") ?? document).querySelector("[data-problem]");
}

document.addEventListener("submit", (event) => {
  const form = event.target;
  const button = form.querySelector("button[type=submit]");
  if (form.matches("[data-buy]")) {
    event.preventDefault();
    step(button, placeOf(form), () => buy(form));
  } else if (form.matches("[data-location]")) {
    event.preventDefault();
    step(button, placeOf(form), async () => {
      const fields = new FormData(form);
      const place = { latitude: Number(fields.get("latitude")), longitude: Number(fields.get("longitude")) };
      await send("PATCH", `/api/v1/students/${form.dataset.location}`, place);
      refresh();
    });
  }
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-confirm], button[data-retry]");
  if (!button) return;
  step(button, placeOf(button), async () => {
    if (button.dataset.confirm) {
      performance.mark("caravan:pay");
      await send("POST", `/api/v1/payments/${button.dataset.confirm}/confirm`);
      performance.mark("caravan:paid");
      refresh();
    } else {
      const body = { checkoutId: button.dataset.retry };
      const payment = await send("POST", "/api/v1/payments", body, button.dataset.key);
      location.assign(`/checkout/${payment.id}`);
    }
  });
});

/** Where this device is; throws {detail}. It is asked only when somebody presses the button. */
function locate() {
  return new Promise((found, failed) => {
    const detail = "This device did not say where it is. Please type in latitude and longitude.";
    if (!navigator.geolocation) failed({ detail });
    else navigator.geolocation.getCurrentPosition(found, () => failed({ detail }), { timeout: 15000 });
  });
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-again]");
  const form = button?.form;
  if (!form?.reportValidity()) return;
  step(button, placeOf(button), () => buy(form, { again: true }));
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-locate]");
  if (!button) return;
  step(button, placeOf(button), async () => {
    const { coords } = await locate();
    const fields = button.closest("form").elements;
    fields.latitude.value = coords.latitude.toFixed(5); // a metre
    fields.longitude.value = coords.longitude.toFixed(5);
  });
});

/** How long it has been, on the page's own clock. */
function tick() {
  for (const place of document.querySelectorAll("[data-since]")) {
    const seconds = Math.max(0, Math.floor((Date.now() - Date.parse(place.dataset.since)) / 1000));
    place.textContent = seconds < 60 ? `${seconds} s` : `${Math.floor(seconds / 60)} min`;
  }
}
setInterval(tick, 1000);
