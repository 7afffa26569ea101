import type { Command } from 'commander';
import type { CliEnvironment } from './environment.js';
import { connectApi, readToken, type Api } from './client.js';
import { usageFailure } from './failure.js';
import { safeText } from './text.js';

export const DEFAULT_URL = 'http://127.0.0.1:8007';
export const DEFAULT_TOKEN_FILE = '/var/lib/holdfast/admin-token';

export interface GlobalOptions {
  url?: string;
  tokenFile?: string;
  json?: boolean;
}

/** One run of the command: its options, its streams, its connection to the daemon. */
export class Session {
  readonly isJson: boolean;
  readonly url: string;
  readonly environment: CliEnvironment;
  readonly #tokenFile: string;
  #token: Promise<string> | undefined;
  #api: Promise<Api> | undefined;

  constructor(environment: CliEnvironment, options: GlobalOptions) {
    this.environment = environment;
    this.isJson = options.json === true;
    const { env } = environment;
    this.url = checkUrl(options.url ?? env['HOLDFAST_URL'] ?? DEFAULT_URL);
    this.#tokenFile = options.tokenFile ?? env['HOLDFAST_TOKEN_FILE'] ?? DEFAULT_TOKEN_FILE;
  }

  /** The client; reads the token at the first call. */
  api(): Promise<Api> {
    this.#api ??= this.apiUntil(this.environment.signal);
    return this.#api;
  }

  /** A client beside it that `signal` ends, for what is still to be said after Ctrl-C. */
  async apiUntil(signal: AbortSignal): Promise<Api> {
    this.#token ??= readToken(this.#tokenFile, (text) => {
      this.note(`warning: ${text}`);
    });
    return connectApi({ url: this.url, token: await this.#token, signal });
  }

  /** A client that sends no token. */
  openApi(): Api {
    return connectApi({ url: this.url, token: null, signal: this.environment.signal });
  }

  /** The one document of this run: JSON for programs, else what `toText` makes of it. */
  print(document: unknown, toText: () => string): void {
    this.environment.stdout.write(this.isJson ? `${JSON.stringify(document, null, 2)}\n` : toText());
  }

  /** A remark beside the result, for people. */
  note(text: string): void {
    this.environment.stderr.write(`${safeText(text)}\n`);
  }
}

function checkUrl(text: string): string {
  const url = URL.canParse(text) ? new URL(text) : null;
  if (url === null || !['http:', 'https:'].includes(url.protocol)) {
    throw usageFailure(`--url ${safeText(text)} is not an http or https address`);
  }
  if (url.username !== '' || url.password !== '') {
    throw usageFailure('--url must not hold a password: the token comes from a file');
  }
  return url.origin + (url.pathname === '/' ? '' : url.pathname);
}

export function openSession(environment: CliEnvironment, command: Command): Session {
  return new Session(environment, command.optsWithGlobals<GlobalOptions>());
}
