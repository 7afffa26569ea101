export interface RowPage<T> {
  rows: T[];
  nextCursor: string | null;
}
/** `cursor` is what an earlier page answered; INVALID_INPUT when it is not one. Stable while rows are added. */
export interface RowPageRequest {
  limit: number;
  cursor: string | null;
}
