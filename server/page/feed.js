// The engine's steps as frames, for as long as the page is looked at; a connection that ends is made again.

import { events, Refused, request } from "./http.js";

const AGAIN_MS = [500, 1000, 2000, 4000]; // between attempts; the last one goes on

/**
 * Calls `onFrame(frame)` for every frame, and `onTrouble(refused)` whenever there is none to be had: for a wrong key
 * until `again` is called. Returns `again`, which makes a new connection at once.
 */
export function follow(onFrame, onTrouble) {
  let controller = new AbortController();
  let wake = () => {};

  const again = () => {
    controller.abort();
    wake();
  };
  const until = (milliseconds) =>
    new Promise((resolve) => {
      wake = resolve;
      if (milliseconds !== Infinity) setTimeout(resolve, milliseconds);
    });

  async function connect() {
    controller = new AbortController();
    const response = await request("/steps", { accept: "text/event-stream", signal: controller.signal });
    for await (const frame of events(response)) onFrame(frame);
    throw new Refused(0, "The server has closed the connection.");
  }

  async function keepOn() {
    let failures = 0;
    for (;;) {
      if (document.hidden) await until(Infinity);
      const began = performance.now();
      try {
        await connect();
      } catch (error) {
        if (error.name === "AbortError") continue;
        if (performance.now() - began > 5000) failures = 0;
        const trouble = error instanceof Refused ? error : new Refused(0, "The connection to the server is lost.");
        onTrouble(trouble);
        const pause = AGAIN_MS[Math.min(failures++, AGAIN_MS.length - 1)];
        await until(trouble.wantsKey ? Infinity : Math.max(pause, 1000 * trouble.retryAfter));
      }
    }
  }

  document.addEventListener("visibilitychange", again);
  keepOn();
  return again;
}
