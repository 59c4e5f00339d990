// Requests to the server that this page came from, with the key that it asks for, if it does.

const KEY = "kvist.key";

/** The server said no; the message is its own. */
export class Refused extends Error {
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }
}

let askForKey: () => Promise<string | null> = async () => null;
let asking: Promise<string | null> | null = null;

/** How to ask the person for a key when the server demands one. */
export function onKeyNeeded(ask: () => Promise<string | null>): void {
  askForKey = ask;
}

/** Fetch a path below the page's own; a server that wants a key gets one, or says why not. */
export async function request(path: string, init: RequestInit = {}): Promise<Response> {
  for (let tries = 0; ; tries++) {
    const key = sessionStorage.getItem(KEY);
    const headers = new Headers(init.headers);
    if (key) headers.set("Authorization", `Bearer ${key}`);
    const response = await fetch(path, { ...init, headers });
    if (response.status === 401 && tries < 5) {
      // Somebody else may have got a key while this request was under way.
      if (sessionStorage.getItem(KEY) !== key) continue;
      asking ??= askForKey().finally(() => {
        asking = null;
      });
      const given = await asking;
      if (given) {
        sessionStorage.setItem(KEY, given);
        continue;
      }
    }
    if (!response.ok) throw new Refused(await explain(response), response.status);
    return response;
  }
}

async function explain(response: Response): Promise<string> {
  try {
    const body = await response.json();
    const message = body?.error?.message ?? body?.detail;
    if (typeof message === "string") return message;
  } catch {
    // not JSON: the status has to do
  }
  return `the server answered ${response.status} ${response.statusText}`.trim();
}

export interface ServerEvent {
  event: string;
  data: string;
}

/** The server-sent events of a response, as they arrive. */
export async function* events(response: Response): AsyncGenerator<ServerEvent> {
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = "message";
  let data: string[] = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop() ?? "";
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { event, data: data.join("\n") };
          event = "message";
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(5).replace(/^ /, ""));
        } else if (line.startsWith("event:")) {
          event = line.slice(6).trim();
        }
      }
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
}
