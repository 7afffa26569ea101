import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { runCli } from '../../src/cli/program.js';
import type { TextStream } from '../../src/cli/environment.js';
import type { RepositoryView, RunView, VmView } from '../../src/engine/types.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { SAMPLE_VM, startFixture, type ApiFixture } from '../api/fixture.js';

export interface CliResult {
  code: number;
  stdout: string;
  stderr: string;
  /** Standard output as JSON. */
  json: unknown;
}

export interface CliOptions {
  /** Standard error is a terminal of this width. */
  columns?: number;
  env?: Record<string, string>;
  signal?: AbortSignal;
}

export interface CliFixture extends AsyncDisposable {
  api: ApiFixture;
  directory: string;
  tokenFile: string;
  run(args: string[], options?: CliOptions): Promise<CliResult>;
}

class Capture implements TextStream {
  text = '';
  constructor(
    readonly isTTY: boolean,
    readonly columns: number | undefined,
  ) {}
  write(text: string): void {
    this.text += text;
  }
}

/** A real API server over the fake engine, and the command run against it. */
export async function startCliFixture(): Promise<CliFixture> {
  const api = await startFixture();
  const directory = await mkdtemp(path.join(tmpdir(), 'holdfast-cli-'));
  const tokenFile = path.join(directory, 'token');
  await writeFile(tokenFile, `${api.token}\n`, { mode: 0o600 });
  const env = { HOLDFAST_URL: api.server.url, HOLDFAST_TOKEN_FILE: tokenFile };
  return {
    api,
    directory,
    tokenFile,
    run: async (args, options = {}) => {
      const stdout = new Capture(false, undefined);
      const stderr = new Capture(options.columns !== undefined, options.columns);
      const signal = options.signal ?? new AbortController().signal;
      const code = await runCli(args, { stdout, stderr, signal, env: { ...env, ...options.env } });
      const isJson = args.includes('--json') && stdout.text !== '';
      return {
        code,
        stdout: stdout.text,
        stderr: stderr.text,
        json: isJson ? JSON.parse(stdout.text) : null,
      };
    },
    [Symbol.asyncDispose]: async () => {
      await api[Symbol.asyncDispose]();
      await rm(directory, { recursive: true });
    },
  };
}

export async function addVm(cli: CliFixture, name = SAMPLE_VM.name): Promise<VmView> {
  const answer = await cli.api.call('POST', '/api/v1/vms', { body: { ...SAMPLE_VM, name } });
  return answer.json as VmView;
}

export async function addRepository(cli: CliFixture, name = 'main'): Promise<RepositoryView> {
  const body = { name, root: '/repo' };
  return (await cli.api.call('POST', '/api/v1/repositories', { body })).json as RepositoryView;
}

/** The run the command has asked for, once somebody watches it. */
export async function nextRun(cli: CliFixture): Promise<RunView> {
  await pollUntil(() => (cli.api.engine.watchers > 0 ? true : undefined), {
    timeoutMs: 10_000,
    what: 'the command watching its run',
  });
  return cli.api.engine.runs[0]!;
}
