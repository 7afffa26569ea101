export type * from '../../native/lib/types.js';
