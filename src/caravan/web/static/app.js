// What every page has: say things aloud, and show what went wrong with a request that htmx made.

const announcements = document.getElementById("announcements");
const problems = document.getElementById("problems");

/** Tell people who listen to the page what changed on it. */
export function announce(text) {
  announcements.textContent = text;
}

/** Show what did not work, until the next thing that does. */
export function showProblem(text) {
  const line = document.createElement("p");
  line.textContent = text;
  problems.replaceChildren(line);
}

document.addEventListener("caravan:problem", (event) => showProblem(event.detail.detail));
document.addEventListener("htmx:error", () => showProblem("The server could not be reached. Please try again."));
document.addEventListener("htmx:after:swap", () => problems.replaceChildren());
