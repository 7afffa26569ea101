import { afterEach, beforeEach, expect, it } from 'vitest';
import type { EngineContext } from '../../src/engine/context.js';
import { createHealthUseCases } from '../../src/engine/doctor.js';
import type { DoctorFinding } from '../../src/engine/types.js';
import { openEngineContext, SETTINGS } from '../../test/engine/engine-context.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { definition, makeImage, startExportd, type ExportdRig } from './rig.js';

let directory: LabDirectory;
let rig: ExportdRig;
let context: EngineContext;

beforeEach(async () => {
  directory = await makeLabDirectory();
  rig = await startExportd({ directory: directory.path });
  const { exportsDirectory, pidFile, statusFile } = rig;
  const exports = { ...SETTINGS.exports, directory: exportsDirectory, pidFile, statusFile };
  context = await openEngineContext(directory.path, { settings: { ...SETTINGS, exports } });
});
afterEach(async () => {
  await context.db[Symbol.asyncDispose]();
  await rig[Symbol.asyncDispose]();
  await directory[Symbol.asyncDispose]();
});

async function find(change: Partial<EngineContext> = {}): Promise<DoctorFinding | undefined> {
  const findings = await createHealthUseCases({ ...context, ...change }).doctor();
  return findings.find(({ name }) => name === 'export daemon');
}

it('the doctor finds a daemon that runs, one that reads another directory, and one that was killed', async () => {
  expect(await find()).toMatchObject({ isOk: true, found: 'serves 0 of 0 files', remedy: null });
  await makeImage(directory.file('disk.qcow2'), { pattern: 0x11 });
  await rig.write('disk.conf', definition('disk', directory.file('disk.qcow2')));
  await rig.write('lost.conf', definition('lost', directory.file('lost.qcow2')));
  await rig.reload();
  expect(await find()).toMatchObject({ isOk: true, found: 'serves 1 of 2 files' });
  const elsewhere = { ...context.settings.exports, directory: directory.file('elsewhere') };
  expect(await find({ settings: { ...context.settings, exports: elsewhere } })).toMatchObject({
    isOk: false,
    found: expect.stringContaining(rig.exportsDirectory) as string,
  });
  await rig.kill();
  expect(await find()).toMatchObject({
    isOk: false,
    found: expect.stringContaining('no export daemon runs') as string,
  });
});
