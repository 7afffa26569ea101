import { z } from 'zod';
import { AppError } from '../src/lib/errors.js';
import { isUlid, type VmId } from '../src/lib/id.js';
import type { RepositoryContext } from './context.js';
import { VMS_DIRECTORY, vmDirectory, vmRecordFile } from './layout.js';
import { vmDiskRecordSchema } from './manifest.js';
import { requireWritable } from './marker.js';
import { idSchema, requireSealed, sealJson } from './sealed-json.js';
import { FORMAT_VERSION, type VmRecord } from './types.js';

const recordShape = {
  vmId: idSchema<VmId>(),
  name: z.string().min(1).max(4096),
  disks: z.array(vmDiskRecordSchema).max(1024),
};
const recordSchema = z.strictObject(recordShape);
const storedSchema = z.strictObject({ formatVersion: z.literal(FORMAT_VERSION), ...recordShape });

/** Writes `vm.json`, creating the VM's directory. */
export async function putVm(context: RepositoryContext, vm: VmRecord): Promise<void> {
  const record = recordSchema.safeParse(vm);
  if (!record.success) {
    throw new AppError('INVALID_INPUT', `this is no VM record: ${z.prettifyError(record.error)}`);
  }
  await requireWritable(context);
  await context.backend.makeDirectory(vmDirectory(vm.vmId));
  await context.backend.writeDurable(
    vmRecordFile(vm.vmId),
    sealJson({ formatVersion: FORMAT_VERSION, ...record.data }),
  );
}

export async function listVmIds(context: RepositoryContext): Promise<VmId[]> {
  const entries = (await context.backend.list(VMS_DIRECTORY)) ?? [];
  return entries
    .filter((entry) => entry.kind === 'directory' && isUlid(entry.name))
    .map((entry) => entry.name as VmId)
    .sort();
}

/** NOT_FOUND when the repository has no such VM, MANIFEST_UNREADABLE when its record cannot be read. */
export async function readVm(context: RepositoryContext, vmId: VmId): Promise<VmRecord> {
  const file = vmRecordFile(vmId);
  const data = await context.backend.read(file, { maxBytes: 16 * 1024 * 1024 });
  if (data === undefined) {
    throw new AppError('NOT_FOUND', 'the repository has no such VM', { details: { vmId } });
  }
  const {
    vmId: storedId,
    name,
    disks,
  } = requireSealed(data, {
    schema: storedSchema,
    what: file,
    formatVersion: FORMAT_VERSION,
    code: 'MANIFEST_UNREADABLE',
  });
  if (storedId === vmId) return { vmId, name, disks };
  throw new AppError('MANIFEST_UNREADABLE', `${file} is the record of another VM`, { details: { file } });
}
