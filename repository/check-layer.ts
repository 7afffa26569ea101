import { AppError, isErrorCode, toAppError } from '../src/lib/errors.js';
import { requireAgreement } from './agreement.js';
import { describeLayer, requireLayerHeader } from './chain.js';
import type { CheckFinding, LayerTask } from './check-report.js';
import type { RepositoryContext } from './context.js';
import { Qcow2File } from './qcow2.js';
import { checkImage } from './qemu-img.js';
import { openVerifiedSums } from './verified-sums.js';

/** Everything about one layer that can be told without reading its data. */
export async function checkLayerStructure(
  context: RepositoryContext,
  task: LayerTask,
  signal: AbortSignal | undefined,
): Promise<CheckFinding[]> {
  const layer = describeLayer(context, task.point, task.disk);
  const findings: CheckFinding[] = [];
  const isThere = await note(findings, task, async () => {
    await requireLayerHeader(layer.path, task.disk);
  });
  if (isThere) {
    await note(findings, task, async () => {
      const { errors, leaks } = await checkImage(layer.path, signal);
      if (errors > 0)
        throw new AppError('LAYER_CORRUPT', `qemu-img check found ${errors} errors`, {
          details: { file: layer.path },
        });
      if (leaks > 0) {
        findings.push({
          ...describeTask(task),
          code: 'LEFTOVER',
          severity: 'warning',
          message: `${leaks} clusters of the layer file are counted but not used; its content is whole`,
          file: layer.path,
        });
      }
    });
  }
  await note(findings, task, async () => {
    await using sums = await openVerifiedSums(layer, signal);
    if (!isThere) return;
    await using image = await Qcow2File.open(layer.path);
    await requireAgreement(image, sums, { file: layer.path, signal });
  });
  return findings;
}

export function describeTask(task: LayerTask): Pick<CheckFinding, 'vmId' | 'pointId' | 'diskId' | 'layerId'> {
  return {
    vmId: task.point.vmId,
    pointId: task.point.pointId,
    diskId: task.disk.diskId,
    layerId: task.disk.layerId,
  };
}

async function note(findings: CheckFinding[], task: LayerTask, look: () => Promise<void>): Promise<boolean> {
  try {
    await look();
    return true;
  } catch (error) {
    findings.push(toFinding(task, error));
    return false;
  }
}

/** Damage as a finding. An error that says nothing about the layer (cancelled, offline) is thrown on. */
export function toFinding(task: LayerTask, error: unknown): CheckFinding {
  const { code, message, details } = toAppError(error);
  const place = {
    ...describeTask(task),
    severity: 'error' as const,
    message,
    ...(typeof details['file'] === 'string' ? { file: details['file'] } : {}),
    ...(typeof details['offset'] === 'number' ? { offset: details['offset'] } : {}),
  };
  if (code === 'LAYER_NOT_FOUND' || code === 'LAYER_CORRUPT' || code === 'CHAIN_BROKEN')
    return { code, ...place };
  // A file that cannot be read (EIO), or that the tool cannot open, is damage of this layer.
  if (isErrorCode(error, 'REPOSITORY_IO', 'TOOL_FAILED')) return { code: 'LAYER_CORRUPT', ...place };
  throw error;
}
