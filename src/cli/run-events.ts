import type { Api, Schemas } from './client.js';
import { problemFailure } from './client.js';

/** The daemon sends a heartbeat every 15 s; three missed ones mean that nobody is there. */
const SILENCE_MS = 45_000;
const MAX_EVENT_CHARACTERS = 16 * 1024 * 1024;

type Run = Schemas['Run'];

/** The stream went silent, was cut or broke its form: follow the run another way, or again. */
export class StreamLost extends Error {
  override readonly name = 'StreamLost';
}

/**
 * The states of a run as the daemon tells them, until its stream ends. Throws StreamLost when the
 * stream fails on its way, a CliFailure when the daemon refuses or does not answer.
 */
export async function* watchEvents(api: Api, id: string): AsyncGenerator<Run> {
  const silence = new AbortController();
  let timer = setTimeout(() => undefined, 0);
  const heard = (): void => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      silence.abort();
    }, SILENCE_MS);
  };
  heard();
  try {
    const answer = await api.GET('/runs/{id}/events', {
      params: { path: { id } },
      parseAs: 'stream',
      signal: silence.signal,
    });
    if (!answer.response.ok) throw problemFailure(answer.error, answer.response);
    const stream: ReadableStream<Uint8Array> | null | undefined = answer.data;
    if (stream === null || stream === undefined) throw new StreamLost('the stream has no content');
    for await (const event of readEvents(stream, heard)) {
      if (event.name === 'progress') yield JSON.parse(event.data) as Run;
      else throw new StreamLost('the daemon could not go on telling');
    }
  } finally {
    clearTimeout(timer);
    silence.abort();
  }
}

interface ServerEvent {
  name: string;
  data: string;
}

/** Splits the stream into events (WHATWG HTML, section 9.2.6, as far as our daemon uses it). */
async function* readEvents(
  stream: ReadableStream<Uint8Array>,
  heard: () => void,
): AsyncGenerator<ServerEvent> {
  const decoder = new TextDecoder();
  let rest = '';
  try {
    for await (const chunk of stream) {
      heard();
      rest += decoder.decode(chunk, { stream: true });
      if (rest.length > MAX_EVENT_CHARACTERS) throw new StreamLost('an event is too large');
      for (let end = rest.indexOf('\n\n'); end !== -1; end = rest.indexOf('\n\n')) {
        const event = parseEvent(rest.slice(0, end));
        rest = rest.slice(end + 2);
        if (event !== null) yield event;
      }
    }
  } catch (error) {
    throw error instanceof StreamLost ? error : new StreamLost('the stream was cut', { cause: error });
  }
}

/** Null for a comment. */
function parseEvent(text: string): ServerEvent | null {
  let name = '';
  const data: string[] = [];
  for (const line of text.split('\n')) {
    if (line.startsWith('event: ')) name = line.slice('event: '.length);
    else if (line.startsWith('data: ')) data.push(line.slice('data: '.length));
  }
  return data.length === 0 ? null : { name, data: data.join('\n') };
}
