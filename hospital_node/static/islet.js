// Keeps a page as fresh as it says it is: once a minute the same address is asked for again. No page needs this script.
"use strict";
const MINUTE = 60000;
const busy = () => document.querySelector("main :focus, details[open]") !== null;
async function renew() {
  const note = document.getElementById("lost");
  try {
    const answer = await fetch(location.href, { credentials: "same-origin", redirect: "error" });
    if (!answer.ok) throw new Error(String(answer.status));
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
    if (fresh && !busy()) document.querySelector("main").replaceWith(document.adoptNode(fresh));
    if (note) note.hidden = true;
  } catch {
    if (note) note.hidden = false;
  }
}
if (document.querySelector("main[data-live]")) setInterval(() => { if (!document.hidden) renew(); }, MINUTE);
