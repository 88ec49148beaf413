// Keeps the page that you are on true: after any frame, and after any reconnection, it fetches the page again and
// puts its #live part in place (htmx does both, see family.html). A frame is a hint; what it says is never shown.

const BACKOFF_FIRST_MS = 300;
const BACKOFF_MAX_MS = 20_000;
const STEADY_MS = 5_000; // a connection that lives this long was a good one
const PATIENCE_MS = 3_000; // a short break is nobody's business

const live = document.getElementById("live");
const state = document.getElementById("live-state");
const announcements = document.getElementById("announcements");
const heads = live ? JSON.parse(live.dataset.heads) : {}; // student -> last seq that this page knows of

let socket = null;
let attempts = 0;
let timer = 0;
let quiet = 0;

/** Fetch this page again; while one fetch runs, htmx keeps the last further one waiting. */
function refresh() {
  document.body.dispatchEvent(new CustomEvent("caravan:feed"));
}

function connect() {
  clearTimeout(timer);
  if (socket && socket.readyState <= WebSocket.OPEN) return;
  const opened = Date.now();
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws`);
  socket.onopen = () => {
    socket.send(JSON.stringify({ type: "resume", after: heads }));
    if (attempts > 0) refresh();
    clearTimeout(quiet);
    quiet = 0;
    show("");
  };
  socket.onmessage = (message) => hear(JSON.parse(message.data));
  socket.onclose = (event) => {
    if (event.code === 4401) {
      refresh(); // signed out: htmx is led to the login
      return;
    }
    attempts = Date.now() - opened > STEADY_MS ? 1 : attempts + 1;
    // Nobody pushes now, so every attempt to come back is also a look at the truth.
    if (attempts > 1) refresh();
    quiet ||= setTimeout(() => show("Connecting again…"), PATIENCE_MS);
    const ceiling = Math.min(BACKOFF_MAX_MS, BACKOFF_FIRST_MS * 2 ** attempts);
    timer = setTimeout(connect, ceiling / 2 + Math.random() * (ceiling / 2));
  };
}

function hear(frame) {
  if (frame.type === "business-event" || frame.type === "resync") {
    heads[frame.studentId] = frame.seq;
    performance.mark("caravan:frame", { detail: frame.event?.type ?? frame.type });
    refresh();
  } else if (frame.type === "error") {
    console.warn("caravan: the server refused a frame", frame.code, frame.detail);
  }
}

function show(text) {
  if (state.textContent !== text && text) announcements.textContent = text;
  state.textContent = text;
  state.hidden = !text;
}

if (live && Object.keys(heads).length > 0) {
  connect();
  addEventListener("online", connect);
  addEventListener("pageshow", (event) => event.persisted && (refresh(), connect()));
  document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && connect());
}
