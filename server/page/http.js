// Requests to the server that sent this page, with the key where one is needed, and the events of a stream.

const STORED = "quire-key"; // in this tab, and gone with it

/** An answer that is an error. `status` 0: nobody answered. */
export class Refused extends Error {
  constructor(status, message, code = "", retryAfter = 0) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }

  get wantsKey() {
    return this.status === 401 || (this.status === 403 && this.code === "missing_scope");
  }
}

export function useKey(key) {
  if (key) sessionStorage.setItem(STORED, key);
  else sessionStorage.removeItem(STORED);
}

/** The response, if it is a good one; throws Refused, or AbortError when `signal` says so. */
export async function request(path, { body, accept, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(STORED);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (accept) headers.Accept = accept;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer.");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  const told = answer.error ?? {};
  const wait = Number(response.headers.get("Retry-After") ?? 0);
  throw new Refused(response.status, told.message ?? `The server answered ${response.status}.`, told.code, wait);
}

/** The payloads of a stream of server-sent events, parsed; comments and `[DONE]` are left out. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const frames = (rest + value).split("\n\n");
      rest = frames.pop();
      for (const frame of frames) {
        if (frame.startsWith("data: ") && frame !== "data: [DONE]") yield JSON.parse(frame.slice(6));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
