import { readFile } from 'node:fs/promises';
import createClient, { type Client } from 'openapi-fetch';
import type { components, paths } from '../../src/api/generated.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { AppError } from '../../src/lib/errors.js';

export type Schemas = components['schemas'];
export type ApiRun = Schemas['Run'];
export type ApiBackup = Schemas['Backup'];
export type ApiClient = Client<paths>;

export async function openApi(options: { url: string; tokenFile: string }): Promise<ApiClient> {
  const token = (await readFile(options.tokenFile, 'utf8')).trim();
  return createClient<paths>({
    baseUrl: `${options.url}/api/v1`,
    headers: { authorization: `Bearer ${token}` },
  });
}

/** The body of an answer, or an error with what the daemon said. */
export function dataOf<T>(answer: { data?: T; error?: unknown; response: Response }): T {
  if (answer.data !== undefined) return answer.data;
  const problem = answer.error as Partial<Schemas['Problem']> | undefined;
  const words = [problem?.code, problem?.detail, problem?.remedy].filter((part) => part !== undefined);
  throw new AppError('INTERNAL', `the daemon answered ${answer.response.status}: ${words.join(': ')}`);
}

const ENDED = new Set<ApiRun['state']>(['completed', 'failed', 'cancelled', 'interrupted']);

/** Asks until the run has ended, and answers it when it is completed; else an error with its reason. */
export async function waitForRun(
  api: ApiClient,
  id: string,
  options: { timeoutMs: number; intervalMs: number; onProgress?: (run: ApiRun) => void },
): Promise<ApiRun> {
  const run = await pollUntil(
    async () => {
      const now = dataOf(await api.GET('/runs/{id}', { params: { path: { id } } }));
      options.onProgress?.(now);
      return ENDED.has(now.state) ? now : undefined;
    },
    { timeoutMs: options.timeoutMs, intervalMs: options.intervalMs, what: `the end of run ${id}` },
  );
  if (run.state !== 'completed') {
    const { code, message, remedy } = run.error ?? { code: 'INTERNAL', message: 'no reason', remedy: '' };
    throw new AppError(
      'INTERNAL',
      `the ${run.kind} run ${id} is ${run.state}: ${code}: ${message} ${remedy}`,
    );
  }
  return run;
}

/** The point a completed backup made. */
export function pointOf(run: ApiRun): string {
  if (run.result?.kind !== 'backup') throw new AppError('INTERNAL', `run ${run.id} made no point`);
  return run.result.pointId;
}
