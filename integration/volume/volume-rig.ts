import { expect } from 'vitest';
import type { OperationView, VolumeView } from '../../src/engine/types.js';
import { pollUntil } from '../../src/lib/deadline.js';
import type { ErrorCode } from '../../src/lib/errors.js';
import { runTool } from '../../src/lib/process.js';
import type { Daemon } from '../daemon/daemon.js';

const TIMEOUT_MS = 20_000;

export const tool = async (name: string, ...args: string[]): Promise<string> =>
  (await runTool(name, args, { timeoutMs: TIMEOUT_MS })).stdout.trim();

/** Registers a volume by a path, or by an identity. */
export function addVolume(daemon: Daemon, from: string, name: string | null = null): Promise<VolumeView> {
  const by = from.startsWith('/') ? { devicePath: from } : { identity: from };
  return daemon.expect<VolumeView>(201, 'POST', '/volumes', { name, ...by });
}

export function showVolume(daemon: Daemon, { id }: { id: string }): Promise<VolumeView> {
  return daemon.expect<VolumeView>(200, 'GET', `/volumes/${id}`);
}

/** Asks for the operation and answers it as it ended. */
export async function operate(
  daemon: Daemon,
  { id }: { id: string },
  action: 'attach' | 'detach',
): Promise<OperationView> {
  const begun = await daemon.expect<OperationView>(202, 'POST', `/volumes/${id}/${action}`);
  expect([begun.kind, begun.subjectId]).toEqual([`${action}-volume`, id]);
  return endOf(daemon, begun);
}

export function endOf(daemon: Daemon, { id }: { id: string }): Promise<OperationView> {
  return pollUntil(
    async () => {
      const operation = await daemon.expect<OperationView>(200, 'GET', `/operations/${id}`);
      return ['queued', 'running'].includes(operation.state) ? undefined : operation;
    },
    { timeoutMs: TIMEOUT_MS, intervalMs: 30, what: `operation ${id} ending` },
  );
}

export async function attach(daemon: Daemon, volume: { id: string }): Promise<VolumeView> {
  const ended = await operate(daemon, volume, 'attach');
  expect([ended.state, ended.error], JSON.stringify(ended.error)).toEqual(['completed', null]);
  return showVolume(daemon, volume);
}

export async function detach(daemon: Daemon, volume: { id: string }): Promise<void> {
  const ended = await operate(daemon, volume, 'detach');
  expect([ended.state, ended.error], JSON.stringify(ended.error)).toEqual(['completed', null]);
}

/** The operation fails with this code; answers its message. */
export async function expectFailing(
  daemon: Daemon,
  volume: { id: string },
  { action, code }: { action: 'attach' | 'detach'; code: ErrorCode },
): Promise<string> {
  const ended = await operate(daemon, volume, action);
  expect([ended.state, ended.error?.code], JSON.stringify(ended.error)).toEqual(['failed', code]);
  return ended.error?.message ?? '';
}

/** The request is refused with this code; answers the detail. */
export async function expectRefused(
  daemon: Daemon,
  request: [method: string, route: string, body?: unknown],
  code: ErrorCode,
): Promise<string> {
  const { status, body } = await daemon.request(...request);
  const problem = body as { code?: string; detail?: string };
  expect([status >= 400, problem.code], JSON.stringify(body)).toEqual([true, code]);
  return problem.detail ?? '';
}
