import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { EngineContext } from '../../src/engine/context.js';
import { createHealthUseCases } from '../../src/engine/doctor.js';
import type { DoctorFinding } from '../../src/engine/types.js';
import type { ExportFileStatus, ExportStatus } from '../../src/exports/index.js';
import { processStartTime } from '../../src/lib/process.js';
import { openEngineContext, SETTINGS } from './engine-context.js';

describe('the export daemon, as the doctor finds it', () => {
  let directory: string;
  let context: EngineContext;
  const at = (name: string): string => path.join(directory, name);

  beforeEach(async () => {
    directory = await mkdtemp(path.join(os.tmpdir(), 'hf-doctor-'));
    const exports = {
      ...SETTINGS.exports,
      directory: at('exports.d'),
      pidFile: at('exportd.pid'),
      statusFile: at('status.json'),
    };
    context = await openEngineContext(directory, { settings: { ...SETTINGS, exports } });
  });
  afterEach(async () => {
    await context.db[Symbol.asyncDispose]();
    await rm(directory, { recursive: true });
  });

  /** What a daemon writes that is this process. */
  async function writeStatus(change: Partial<ExportStatus> = {}): Promise<void> {
    const status: ExportStatus = {
      version: 1,
      pid: process.pid,
      processStartTime: (await processStartTime(process.pid))!,
      startedAt: '2026-11-21T00:00:00.000Z',
      exportsDirectory: at('exports.d'),
      generation: 1,
      appliedAt: '2026-11-21T00:00:00.000Z',
      readAtMs: 1,
      listeners: [],
      files: [],
      events: [],
      ...change,
    };
    await writeFile(at('status.json'), JSON.stringify(status));
    await writeFile(at('exportd.pid'), `${status.pid}\n`);
  }
  async function find(): Promise<DoctorFinding | undefined> {
    const findings = await createHealthUseCases(context).doctor();
    expect(findings.map(({ name }) => name)).toEqual(expect.arrayContaining(['qemu-img', 'database']));
    return findings.find(({ name }) => name === 'export daemon');
  }

  it('runs, and how many of the files it serves', async () => {
    const served: ExportFileStatus = {
      file: 'a.conf',
      digest: null,
      name: 'a',
      state: 'served',
      listeners: [],
      sizeBytes: null,
      format: null,
      isReadOnly: null,
      description: null,
      materialize: null,
      error: null,
    };
    const failed: ExportFileStatus = { ...served, file: 'b.conf', state: 'failed' };
    await writeStatus({ files: [served, failed] });
    expect(await find()).toEqual({
      name: 'export daemon',
      isOk: true,
      isRequired: false,
      found: 'serves 1 of 2 files',
      remedy: null,
    });
  });

  it('is not needed where it never ran', async () => {
    expect(await find()).toMatchObject({
      isOk: false,
      isRequired: false,
      found: expect.stringContaining(at('exportd.pid')) as string,
      remedy: expect.stringContaining('Start holdfast-exportd') as string,
    });
  });

  it('is missed when its last word is there and the process is another, or its pid file names another', async () => {
    await writeStatus({ processStartTime: '1' });
    expect(await find()).toMatchObject({
      isOk: false,
      found: expect.stringContaining('no export daemon') as string,
    });
    await writeStatus();
    expect(await find()).toMatchObject({ isOk: true });
    await writeFile(at('exportd.pid'), '1\n');
    expect(await find()).toMatchObject({
      isOk: false,
      found: expect.stringContaining('no export daemon') as string,
    });
  });

  it('is of no use when it reads another directory', async () => {
    await writeStatus({ exportsDirectory: '/etc/elsewhere' });
    const finding = await find();
    expect(finding).toMatchObject({ isOk: false, isRequired: false });
    expect(finding?.found).toContain('/etc/elsewhere');
    expect(finding?.found).toContain(at('exports.d'));
    expect(finding?.remedy).toContain('exportsDirectory');
  });

  it('does not keep the doctor from the rest when its files cannot be understood or read', async () => {
    await writeStatus();
    await writeFile(at('status.json'), '{"version":2}');
    expect(await find()).toMatchObject({
      isOk: false,
      found: expect.stringContaining('is not a status of holdfast-exportd') as string,
      remedy: expect.stringContaining('exports.statusFile') as string,
    });
    await rm(at('status.json'));
    await mkdir(at('status.json'));
    expect(await find()).toMatchObject({ isOk: false, found: expect.stringContaining('EISDIR') as string });
  });
});
